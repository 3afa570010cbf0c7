"""A frozen teacher, which computes logits of a few positions of a batch at a time."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlxchat.config.schema import TeacherConfig
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.errors import DataError
from mlxchat.model.checkpoint import load_checkpoint
from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import flatten_parameters, set_parameters
from mlxchat.ops.device import compiled_method
from mlxchat.ops.loss import Logits


class Distillation:
    """A teacher and the weight of its distributions in the loss."""

    def __init__(self, teacher: GPT, mix: TeacherConfig, dtype: mx.Dtype) -> None:
        """Cast the teacher's weights to the dtype of the computation."""
        self.teacher, self.mix = teacher, mix
        set_parameters(teacher, {name: value.astype(dtype) for name, value in flatten_parameters(teacher).items()})
        mx.eval(flatten_parameters(teacher))
        self._states = compiled_method(teacher.hidden)

    def see(self, ids: mx.array) -> mx.array:
        """Return what `logits` needs of a batch (B, T): the states (B, T, C) of all positions."""
        return self._states(ids)

    def logits(self, seen: mx.array) -> Logits:
        """Return the function that gives the logits of a batch."""
        # Not `self`, whose compiled function MLX could not free together with the step's, which keeps this closure.
        teacher = self.teacher

        def of(part: slice, after: list[mx.array]) -> mx.array:
            (states,) = mx.depends([seen[:, part].reshape(-1, seen.shape[-1])], after)
            return teacher.logits(states)

        return of


def load_teacher(
    config: TeacherConfig, folder: Path, tokenizer: Tokenizer, *, row_tokens: int, dtype: mx.Dtype
) -> Distillation:
    """Return the teacher in a folder; DataError if its vocabulary is not the student's or its context is too short."""
    teacher, its_tokenizer, _ = load_checkpoint(folder)
    ours, theirs = (each.special_ids | dict(each.ranks) for each in (tokenizer, its_tokenizer))
    if ours != theirs:
        raise DataError(
            f"the teacher {folder} has another vocabulary: {len(theirs):,} tokens there, {len(ours):,} here, of which "
            f"{len(ours.items() & theirs.items()):,} are the same. Its distributions are over other tokens. Train on "
            "its answers instead: mlxchat distill"
        )
    if (context := teacher.sizes.context_tokens) < row_tokens:
        raise DataError(
            f"the teacher {folder} takes {context:,} tokens at a time, rows have {row_tokens:,}: lower batch.row_tokens"
        )
    return Distillation(teacher, config, dtype)
