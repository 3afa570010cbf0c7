"""A frozen teacher, which computes logits of a few positions of a batch at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from mlxchat.config.schema import TeacherConfig
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.vocabulary import RANKS_FILE, byte_letters
from mlxchat.engine.third_party import ThirdPartyEngine
from mlxchat.errors import ConfigError, DataError
from mlxchat.model.checkpoint import load_checkpoint
from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters
from mlxchat.ops.loss import Logits, Mix, soft_cap
from mlxchat.planning.memory import TeacherSize
from mlxchat.training.forecast_finetune import measure_teacher, teacher_context

_MOST_SHOWN = 3


class TeacherModel(Protocol):
    """A model that computes logits."""

    capped: bool
    """Whether its logits lie within ±15."""

    def logits(self, ids: mx.array) -> Logits:
        """Return the function that gives the logits of a batch (B, T)."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A teacher and the weight of its distributions in the loss."""

    teacher: TeacherModel
    mix: Mix
    size: TeacherSize


class OwnTeacher:
    """A checkpoint of ours: computes the states of all positions once, the head part by part."""

    capped = True

    def __init__(self, model: GPT, dtype: mx.Dtype) -> None:
        """Take the model and cast its weights to the dtype of the computation."""
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
    """A model of mlx-lm; its KV cache continues a batch from one part of the positions to the next."""

    capped = False

    def __init__(self, model: Any, vocab_size: int, folder: Path) -> None:
        """Take the model, the number of its logits without padding, and its folder."""
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
    """Return the teacher in a folder, a checkpoint of ours or a model for mlx-lm, for a student with this tokenizer.

    Raises:
        DataError: it cannot be opened, has another vocabulary, or its context is shorter than a row.
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
            engine = ThirdPartyEngine.load(folder)
        except ConfigError:
            raise ConfigError(f"the teacher {folder} needs mlx-lm: pip install 'mlxchat[outside]'") from None
        theirs = engine.tokenizer.vocabulary()
        context = teacher_context(folder)
        model = OutsideTeacher(engine.model, tokenizer.vocab_size, folder)
    difference = compare_vocabularies(spell_tokens(tokenizer), theirs)
    if difference:
        raise DataError(
            f"the teacher {folder} has another vocabulary: {difference}. Its distributions are over other tokens. "
            "Train on its answers instead: mlxchat distill"
        )
    if context is not None and context < row_tokens:
        raise DataError(
            f"the teacher {folder} takes {context:,} tokens at a time, rows have {row_tokens:,}: lower batch.row_tokens"
        )
    mix = Mix(weight=config.weight, temperature=config.temperature, top_k=config.top_k)
    return Distillation(teacher=model, mix=mix, size=measure_teacher(folder))


def spell_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Return id → token, as a tokenizer.json spells it."""
    letters = byte_letters()
    ordinary = {rank: "".join(letters[byte] for byte in token) for token, rank in tokenizer.ranks.items()}
    return ordinary | {index: name for name, index in tokenizer.special_ids.items()}


def compare_vocabularies(ours: Mapping[int, str], theirs: Mapping[int, str]) -> str:
    """Return a description of how two vocabularies (id → token) differ; empty if they are equal."""
    different = [index for index in sorted(ours.keys() | theirs.keys()) if ours.get(index) != theirs.get(index)]
    if not different:
        return ""
    shown = "; ".join(
        f"id {index} is {_quote(theirs.get(index))} there and {_quote(ours.get(index))} here"
        for index in different[:_MOST_SHOWN]
    )
    return f"{len(theirs):,} tokens there, {len(ours):,} here, {len(different):,} ids differ ({shown})"


def _quote(token: str | None) -> str:
    return "no token" if token is None else ascii(token) if not token.isprintable() else f'"{token}"'
