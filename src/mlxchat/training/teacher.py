"""A frozen model that is learnt from: its logits, a few positions of a batch at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.vocabulary import RANKS_FILE, byte_letters
from mlxchat.errors import ConfigError, DataError
from mlxchat.evals.outside import load_outside
from mlxchat.model.checkpoint import load_checkpoint
from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters
from mlxchat.ops.cross_entropy import soft_cap
from mlxchat.ops.distillation import Logits, Mix
from mlxchat.planning.given import TeacherSize, measure_teacher, teacher_context
from mlxchat.teacher_config import TeacherConfig

_MOST_SHOWN = 3


class TeacherModel(Protocol):
    """What gives logits."""

    capped: bool
    """Whether they lie within ±15."""

    def logits(self, ids: mx.array) -> Logits:
        """Return the function that gives the logits of a batch (B, T)."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A teacher and how it is learnt from."""

    teacher: TeacherModel
    mix: Mix
    size: TeacherSize


class OwnTeacher:
    """A checkpoint of ours: the states of all positions, once, and the head where it is asked for."""

    capped = True

    def __init__(self, model: GPT, dtype: mx.Dtype) -> None:
        """Take the model; its weights are kept in the type that is computed in."""
        self.model = model
        set_parameters(model, {name: value.astype(dtype) for name, value in flatten_parameters(model).items()})
        mx.eval(flatten_parameters(model))

    def logits(self, ids: mx.array) -> Logits:
        """See `TeacherModel`."""
        hidden = mx.stop_gradient(self.model.hidden(ids))

        def of(part: slice, after: list[mx.array]) -> mx.array:
            (states,) = mx.depends([hidden[:, part].reshape(-1, hidden.shape[-1])], after)
            return soft_cap(states @ self.model.head_weight.T)

        return of


class OutsideTeacher:
    """A model that mlx-lm opened: its own cache carries a batch from one part of its positions to the next."""

    capped = False

    def __init__(self, model: Any, vocab_size: int, folder: Path) -> None:
        """Take the model, how many of its logits stand for tokens (the rest only pads them), and where it lies."""
        self._model, self.vocab_size, self.folder = model, vocab_size, folder

    def logits(self, ids: mx.array) -> Logits:
        """See `TeacherModel`."""
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self._model)

        def of(part: slice, after: list[mx.array]) -> mx.array:
            (tokens,) = mx.depends([ids[:, part]], after)
            found = self._model(tokens, cache=cache)[..., : self.vocab_size]
            return mx.stop_gradient(found.astype(mx.float32)).reshape(-1, self.vocab_size)

        return of


def load_teacher(
    config: TeacherConfig, folder: Path, tokenizer: Tokenizer, *, row_tokens: int, dtype: mx.Dtype
) -> Distillation:
    """Return a teacher that is ready to be learnt from.

    Args:
        config: how it is learnt from.
        folder: where it lies: a checkpoint of ours, or what mlx-lm opens.
        tokenizer: of the model that learns.
        row_tokens: of its rows.
        dtype: what is computed in.

    Raises:
        DataError: it cannot be opened, has another vocabulary, or takes no rows as long.
        ConfigError: it needs mlx-lm, which is not installed.
    """
    model: TeacherModel
    if (folder / RANKS_FILE).is_file() and (folder / "checkpoint.json").is_file():
        own, its_tokenizer, _ = load_checkpoint(folder)
        theirs = spell_tokens(its_tokenizer)
        context: int | None = own.sizes.context_tokens
        model = OwnTeacher(own, dtype)
    else:
        try:
            outside, its_words = load_outside(folder)
        except ConfigError:
            raise ConfigError(f"the teacher {folder} needs mlx-lm: pip install 'mlxchat[outside]'") from None
        theirs = its_words.vocabulary()
        context = teacher_context(folder)
        model = OutsideTeacher(outside.model, tokenizer.vocab_size, folder)
    difference = compare_vocabularies(spell_tokens(tokenizer), theirs)
    if difference:
        raise DataError(
            f"the teacher {folder} has another vocabulary: {difference}. Its distributions are over other tokens. Of "
            "such a teacher the answers can be learnt: mlxchat distill"
        )
    if context is not None and context < row_tokens:
        raise DataError(f"the teacher {folder} takes {context:,} tokens at a time, rows have {row_tokens:,}")
    mix = Mix(weight=config.weight, temperature=config.temperature, top_k=config.top_k)
    return Distillation(teacher=model, mix=mix, size=measure_teacher(folder))


def spell_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Return id → token, as a tokenizer.json spells it."""
    letters = byte_letters()
    ordinary = {rank: "".join(letters[byte] for byte in token) for token, rank in tokenizer.ranks.items()}
    return ordinary | {index: name for name, index in tokenizer.special_ids.items()}


def compare_vocabularies(ours: Mapping[int, str], theirs: Mapping[int, str]) -> str:
    """Return how two vocabularies (id → token) differ, for people; empty: not at all."""
    different = [index for index in sorted(ours.keys() | theirs.keys()) if ours.get(index) != theirs.get(index)]
    if not different:
        return ""
    shown = "; ".join(
        f"id {index} is {_told(theirs.get(index))} there and {_told(ours.get(index))} here"
        for index in different[:_MOST_SHOWN]
    )
    return f"{len(theirs):,} tokens there, {len(ours):,} here, {len(different):,} ids differ ({shown})"


def _told(token: str | None) -> str:
    return "no token" if token is None else ascii(token) if not token.isprintable() else f'"{token}"'
