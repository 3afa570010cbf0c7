"""What is known, before anything runs, of models that a pipeline does not make itself: imported ones and teachers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxchat.config import Config, FinetuneConfig
from mlxchat.data.vocabulary import HF_FILE, RANKS_FILE
from mlxchat.errors import ConfigError, MlxchatError
from mlxchat.model.sizes import GPTSizes
from mlxchat.runner.bases import find_chain, folder_of_weights, is_adapter
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.store import Store, read_manifest
from mlxchat.teacher_config import TeacherConfig

_ROLE = "checkpoint"
# Numbers per token and channel of a forward pass, one layer at a time.
_FORWARD = 20.0
_BYTES = 4
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")


def find_given_sizes(config: Config, plan: Iterable[PlannedStep]) -> dict[str, GPTSizes]:
    """Return step → sizes of the steps that take in a model, and of those that go on from one; of others nothing.

    Raises:
        DataError: a model that is to be taken in is not there, or what describes it is damaged.
    """
    store = Store(Path(config.outputs))
    found: dict[str, GPTSizes] = {}
    for step in plan:  # inputs come first
        artifact = step.artifacts.get(_ROLE)
        if step.stage.name == "imported" and not step.stage.optional_inputs.keys() & {*step.inputs, *step.artifacts}:
            made = store.find(step.rid) if step.done else None
            found[step.name] = _of_folder(made) if made is not None else _of_config(config)
        elif step.inputs.get(_ROLE) in found:
            found[step.name] = found[step.inputs[_ROLE]]
        elif artifact is not None and (folder := store.find(str(artifact["rid"]))) is not None:
            found[step.name] = _of_folder(folder)
    return found


def check_given(config: Config, plan: Iterable[PlannedStep]) -> None:
    """Refuse to train a model that was taken in on rows longer than its context.

    Raises:
        ConfigError: naming each step, both lengths and the setting.
    """
    plan = list(plan)
    given = find_given_sizes(config, plan)
    problems = []
    for step in plan:
        section = step.stage.name
        if step.done or step.name not in given or section not in ("midtrain", "sft"):
            continue
        rows, context = getattr(config, section).batch.row_tokens, given[step.name].context_tokens
        if rows > context:
            problems.append(
                f"{section}.batch.row_tokens={rows} is longer than the context of the model that {step.name} goes on "
                f"from: {context}. Give {section}.batch.row_tokens={context}"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def describe_imports(config: Config, plan: Iterable[PlannedStep]) -> dict[str, str]:
    """Return step → what is known of the model that it will take in, for people."""
    steps = [step.name for step in plan if step.stage.name == "imported" and not step.done]
    if not steps:
        return {}
    from mlxchat.interop.importing import describe_import

    return dict.fromkeys(steps, describe_import(config.imported))


def _of_folder(folder: Path) -> GPTSizes:
    from mlxchat.interop.names import sizes_from_hf

    return sizes_from_hf(json.loads((folder / "config.json").read_text(encoding="utf-8")), folder.name)


def _of_config(config: Config) -> GPTSizes:
    from mlxchat.interop.importing import sizes_of_import  # only where something is taken in

    return sizes_of_import(config.imported)


@dataclass(frozen=True, kw_only=True)
class TeacherSize:
    """What a teacher holds, in bytes."""

    weights: int
    """As its files have them."""
    kept_per_token: int
    """Of a micro-batch, until its loss is known: final states, or the keys and values of mlx-lm's cache."""
    working_per_token: int
    """Of a micro-batch, before there are logits: the numbers of one layer."""


def teachers_of(config: Config) -> dict[str, FinetuneConfig]:
    """Return stage → section of those that have a teacher."""
    sections = {"midtrain": config.midtrain, "sft": config.sft}
    return {stage: section for stage, section in sections.items() if section.teacher.is_there}


def teacher_folder(teacher: TeacherConfig, outputs: Path) -> Path | None:
    """Return where a teacher lies; None: there is none.

    Raises:
        StoreError: no artifact, or several, have its name.
    """
    if teacher.artifact is not None:
        store = Store(outputs)
        place = store.resolve(teacher.artifact)
        return store.find(read_manifest(place)["rid"]) or place  # an alias has no files of its own
    return None if teacher.path is None else Path(teacher.path)


def measure_teacher(folder: Path) -> TeacherSize:
    """Return what the model of a folder needs, as far as its files say."""
    record = _read_config(folder)
    width = _number(record, "hidden_size", "n_embd", "d_model") or 0
    layers = _number(record, "num_hidden_layers", "n_layer", "n_layers") or 0
    heads = _number(record, "num_attention_heads", "n_head") or 1
    head_width = _number(record, "head_dim") or width // heads
    keys_and_values = 2 * layers * head_width * (_number(record, "num_key_value_heads") or heads)
    whole = folder_of_weights(folder)
    weights = sum(path.stat().st_size for path in whole.glob("model*.safetensors")) if whole.is_dir() else 0
    inner = max(_FORWARD * width, 3 * (_number(record, "intermediate_size") or 0))
    is_ours = (folder / RANKS_FILE).is_file() and (folder / "checkpoint.json").is_file()
    return TeacherSize(
        weights=weights,
        kept_per_token=_BYTES * (width if is_ours else keys_and_values),
        working_per_token=round(_BYTES * inner),
    )


def teacher_context(folder: Path) -> int | None:
    """Return the longest row that a teacher takes; None: its config.json does not say."""
    return _number(_read_config(folder), *_CONTEXT_KEYS)


def check_teachers(config: Config, plan: list[PlannedStep]) -> None:
    """Check the teachers of the steps that are to run.

    Raises:
        ConfigError: naming everything that keeps them from teaching.
    """
    trained = any(step.stage.name == "tokenizer" for step in plan)
    problems = [
        f"{stage}.teacher: {line}"
        for stage, section in teachers_of(config).items()
        if any(step.stage.name == stage and not step.done for step in plan)
        for line in _problems(config, section, trained)
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _problems(config: Config, section: FinetuneConfig, trained: bool) -> Iterator[str]:
    try:
        folder = teacher_folder(section.teacher, Path(config.outputs))
    except MlxchatError as error:
        yield str(error)
        return
    assert folder is not None
    if is_adapter(folder):
        try:
            find_chain(folder)
        except MlxchatError as error:
            yield str(error)
            return
    if not (folder / "config.json").is_file() or not any(folder_of_weights(folder).glob("model*.safetensors")):
        yield f"{folder} holds no model; expected config.json, model*.safetensors and a tokenizer's files"
        return
    context, row_tokens = teacher_context(folder), section.batch.row_tokens
    if context is not None and context < row_tokens:
        yield f"{folder} takes {context:,} tokens at a time, rows have {row_tokens:,}: lower batch.row_tokens"
    tokens = _vocab_size(folder)
    if trained and tokens is not None and tokens != config.tokenizer.vocab_size:
        yield (
            f"{folder} has {tokens:,} tokens, the model will have {config.tokenizer.vocab_size:,}: its distributions "
            "are over other tokens. Only a teacher with the very same tokenizer can be learnt from; of any other "
            "one the answers can: mlxchat distill"
        )


def _vocab_size(folder: Path) -> int | None:
    """Return how many tokens a tokenizer.json has; None: it is not there, or of another kind."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        record = json.loads((folder / HF_FILE).read_text(encoding="utf-8"))
        return len({*record["model"]["vocab"].values(), *(token["id"] for token in record.get("added_tokens") or [])})
    return None


def _read_config(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if isinstance(record, dict):
            return (
                {**record.get("text_config", {}), **record} if isinstance(record.get("text_config"), dict) else record
            )
    return {}


def _number(record: dict[str, Any], *names: str) -> int | None:
    return next((value for name in names if isinstance(value := record.get(name), int) and value > 0), None)
