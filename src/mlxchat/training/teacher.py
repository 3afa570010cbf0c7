"""A frozen teacher, which computes logits of a few positions of a batch at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxchat.config.schema import TeacherConfig
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.vocabulary import RANKS_FILE, byte_letters
from mlxchat.engine.third_party import ThirdPartyEngine
from mlxchat.errors import DataError
from mlxchat.model.checkpoint import load_checkpoint
from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import flatten_parameters, set_parameters
from mlxchat.ops.device import compiled
from mlxchat.ops.loss import Logits, Mix
from mlxchat.planning.memory import TeacherSize
from mlxchat.training.forecast import measure_teacher, teacher_context


class OwnTeacher:
    """A checkpoint of ours: computes the states of all positions once, the head part by part."""

    capped = True
    """Its logits lie within ±15."""

    def __init__(self, model: GPT, dtype: mx.Dtype) -> None:
        """Take the model and cast its weights to the dtype of the computation."""
        self.model = model
        set_parameters(model, {name: value.astype(dtype) for name, value in flatten_parameters(model).items()})
        mx.eval(flatten_parameters(model))
        self._states = compiled(model.hidden)

    def see(self, ids: mx.array) -> mx.array:
        """Return what `logits` needs of a batch (B, T): the states (B, T, C) of all positions."""
        return self._states(ids)

    def logits(self, seen: mx.array) -> Logits:
        """Return the function that gives the logits of a batch."""
        # Not `self`, whose compiled function MLX could not free together with the step's, which keeps this closure.
        model = self.model

        def of(part: slice, after: list[mx.array]) -> mx.array:
            (states,) = mx.depends([seen[:, part].reshape(-1, seen.shape[-1])], after)
            return model.logits(states)

        return of


class OutsideTeacher:
    """A model of mlx-lm; its KV cache continues a batch from one part of the positions to the next."""

    capped = False

    def __init__(self, model: Any, vocab_size: int, folder: Path) -> None:
        """Take the model, the number of its logits without padding, and its folder."""
        self._model, self.vocab_size, self.folder = model, vocab_size, folder

    def see(self, ids: mx.array) -> mx.array:
        """Return the token ids, since logits follow from those of the positions before."""
        return ids

    def logits(self, seen: mx.array) -> Logits:
        """Return the function that gives the logits of a batch."""
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self._model)

        def of(part: slice, after: list[mx.array]) -> mx.array:
            (tokens,) = mx.depends([seen[:, part]], after)
            found = self._model(tokens, cache=cache)[..., : self.vocab_size]
            return mx.stop_gradient(found.astype(mx.float32)).reshape(-1, self.vocab_size)

        return of


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A teacher and the weight of its distributions in the loss."""

    teacher: OwnTeacher | OutsideTeacher
    mix: Mix
    size: TeacherSize


def load_teacher(
    config: TeacherConfig, folder: Path, tokenizer: Tokenizer, *, row_tokens: int, dtype: mx.Dtype
) -> Distillation:
    """Return the teacher in a folder, a checkpoint of ours or a model for mlx-lm, for a student with this tokenizer.

    Raises:
        DataError: it cannot be opened, has another vocabulary, or its context is shorter than a row.
    """
    teacher: OwnTeacher | OutsideTeacher
    if (folder / RANKS_FILE).is_file() and (folder / "checkpoint.json").is_file():
        model, its_tokenizer, _ = load_checkpoint(folder)
        theirs = _spell_tokens(its_tokenizer)
        context: int | None = model.sizes.context_tokens
        teacher = OwnTeacher(model, dtype)
    else:
        engine = ThirdPartyEngine.load(folder)
        theirs = engine.tokenizer.tokens
        context = teacher_context(folder)
        teacher = OutsideTeacher(engine.model, tokenizer.vocab_size, folder)
    ours = _spell_tokens(tokenizer)
    if ours != theirs:
        first = min(index for index in ours.keys() | theirs.keys() if ours.get(index) != theirs.get(index))
        raise DataError(
            f"the teacher {folder} has another vocabulary: {len(theirs):,} tokens there, {len(ours):,} here, and id "
            f"{first} is {theirs.get(first)!a} there, {ours.get(first)!a} here. Its distributions are over other "
            "tokens. Train on its answers instead: mlxchat distill"
        )
    if context is not None and context < row_tokens:
        raise DataError(
            f"the teacher {folder} takes {context:,} tokens at a time, rows have {row_tokens:,}: lower batch.row_tokens"
        )
    mix = Mix(weight=config.weight, temperature=config.temperature, top_k=config.top_k)
    return Distillation(teacher=teacher, mix=mix, size=measure_teacher(folder))


def _spell_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Return id → token, as a tokenizer.json spells it."""
    letters = byte_letters()
    ordinary = {rank: "".join(letters[byte] for byte in token) for token, rank in tokenizer.ranks.items()}
    return ordinary | {index: name for name, index in tokenizer.special_ids.items()}
