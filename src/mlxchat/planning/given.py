"""What a plan is given and does not make: trainings to extend, imported models, teachers, local files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlxchat.config import Config, CorpusConfig, FinetuneConfig, TaskItem
from mlxchat.data.sources import read_file
from mlxchat.data.vocabulary import HF_FILE, RANKS_FILE
from mlxchat.errors import ConfigError, DataError, MlxchatError
from mlxchat.model.sizes import GPTSizes, sizes_of
from mlxchat.planning.horizon import derive_hyperparameters
from mlxchat.runner.bases import find_chain, folder_of_weights, is_adapter
from mlxchat.runner.plan import PlannedStep, flatten_config
from mlxchat.runner.store import CONTINUATION, Manifest, Store, read_manifest
from mlxchat.tasks import load_item
from mlxchat.teacher_config import TeacherConfig

_ROLE = "checkpoint"
# Numbers per token and channel of a teacher's forward pass, one layer at a time.
_FORWARD = 20.0
_BYTES = 4
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")


def check_given(config: Config, plan: list[PlannedStep]) -> None:
    """Check the trainings, models, teachers and local files that the steps to run are given.

    Raises:
        ConfigError: a training cannot be extended, a model's context is shorter than the rows, or a teacher cannot
            teach; all of them.
        DataError: with every line of every file that cannot be used.
    """
    problems = [
        *_extension_problems(config, plan),
        *_warm_start_problems(config, plan),
        *_context_problems(config, plan),
        *_teacher_problems(config, plan),
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    check_local_files(config, plan)


# Trainings to extend

# What shapes or gives meaning to weights and moments, and what a position in the data is counted in.
_SAME = ("model", "architecture", "optimizer.kind", "optimizer.variant", "pretrain.packing")
_MAY_DIFFER = ("architecture.dropout",)


def _extension_problems(config: Config, plan: list[PlannedStep]) -> Iterator[str]:
    """Yield why steps that are to run cannot extend the finished training that they name."""
    planned = {step.name: step for step in plan}
    for step in plan:
        extended = step.artifacts.get("extends")
        if extended is None or step.done:
            continue
        problems = [*_what_lacks(extended), *_what_differs(step, extended, planned)] or _what_is_done(config, extended)
        yield from (f"pretrain.extend={config.pretrain.extend}: {line}" for line in problems)


def _what_lacks(extended: Manifest) -> Iterator[str]:
    if extended["stage"] != "pretrain":
        yield f"{extended['name']} is made by stage {extended['stage']}; only a pretraining can be extended"
    elif not _keeps_state(extended):
        yield (
            f"{extended['name']} has no training state. Train it again with its settings and "
            f"pretrain.save_training_state=true 'force=[{extended['step']}]'"
        )


def _keeps_state(manifest: Manifest) -> bool:
    return {file["path"] for file in manifest["outputs"]}.issuperset(CONTINUATION)


def _warm_start_problems(config: Config, plan: list[PlannedStep]) -> Iterator[str]:
    """Yield why steps that are to run cannot go on with the moments of their checkpoint's training."""
    store, planned = Store(Path(config.outputs)), {step.name: step for step in plan}
    for step in plan:
        if step.done or not getattr(getattr(config, step.stage.name, None), "warm_start", False):
            continue
        source = planned.get(step.inputs.get(_ROLE, ""))
        made = step.artifacts.get(_ROLE)
        if source is not None and source.done:
            made = store.read(source.rid) or source.verdict.original
        if made is not None and not _keeps_state(made):
            yield (
                f"{step.stage.name}.warm_start is true, but {made['name']} was made without a training state. Train it "
                f"again with pretrain.save_training_state=true 'force=[{made['step']}]', or give "
                f"{step.stage.name}.warm_start=false"
            )


def _what_differs(step: PlannedStep, extended: Manifest, planned: Mapping[str, PlannedStep]) -> Iterator[str]:
    if extended["stage"] != step.stage.name:
        return
    now, before = _comparable(step.identity), _comparable(extended["config"])
    for key in sorted(now.keys() | before.keys()):
        if now.get(key) != before.get(key):
            yield f"{key} is {now.get(key)}, but {extended['name']} was made with {before.get(key)}"
    for role, source in step.inputs.items():
        made = extended["inputs"].get(role, {})
        if made.get("rid") != planned[source].rid:
            artifact = made.get("artifact")
            yield f"its {role} is {planned[source].artifact}, but {extended['name']} was made with {artifact}"


def _comparable(identity: Mapping[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in flatten_config(identity).items() if key not in _MAY_DIFFER}
    flat.setdefault("pretrain.packing", "best_fit")  # an identity leaves it out
    return {key: value for key, value in flat.items() if key in _SAME or key.partition(".")[0] in _SAME}


def _what_is_done(config: Config, extended: Manifest) -> list[str]:
    """Return a line if the horizon needs no more iterations than there are."""
    vocab_size, done = extended["derived"]["vocab_size"], extended["derived"]["num_iterations"]
    wanted = derive_hyperparameters(config, sizes_of(config.model, config.architecture, vocab_size)).num_iterations
    if wanted > done:
        return []
    return [
        f"{extended['name']} already has {done} iterations, and the horizon counts {wanted} from the start: give "
        f"pretrain.num_iterations more than {done}"
    ]


# Models


def find_given_sizes(config: Config, plan: Iterable[PlannedStep]) -> dict[str, GPTSizes]:
    """Return step → sizes, of the steps that import a model and those that train or measure one further.

    Raises:
        DataError: a model to be imported is missing, or what describes it is damaged.
    """
    store = Store(Path(config.outputs))
    found: dict[str, GPTSizes] = {}
    for step in plan:  # inputs come first
        artifact = step.artifacts.get(_ROLE)
        if step.stage.name == "imported" and not step.stage.optional_inputs.keys() & {*step.inputs, *step.artifacts}:
            if made := store.find(step.rid) if step.done else None:
                found[step.name] = sizes_of_folder(made)
            else:
                from mlxchat.interop.importing import sizes_of_import

                found[step.name] = sizes_of_import(config.imported)
        elif step.inputs.get(_ROLE) in found:
            found[step.name] = found[step.inputs[_ROLE]]
        elif artifact is not None and (folder := store.find(str(artifact["rid"]))) is not None:
            found[step.name] = sizes_of_folder(folder)
    return found


def sizes_of_folder(folder: Path) -> GPTSizes:
    """Return the sizes of the checkpoint in a folder, adapters included, without its weights."""
    from mlxchat.interop.names import sizes_from_hf

    return sizes_from_hf(json.loads((folder / "config.json").read_text(encoding="utf-8")), folder.name)


def describe_imports(config: Config, plan: Iterable[PlannedStep]) -> dict[str, str]:
    """Return step → what is known of the model that it will import, for people."""
    steps = [step.name for step in plan if step.stage.name == "imported" and not step.done]
    if not steps:
        return {}
    from mlxchat.interop.importing import describe_import

    return dict.fromkeys(steps, describe_import(config.imported))


def _context_problems(config: Config, plan: list[PlannedStep]) -> Iterator[str]:
    given = find_given_sizes(config, plan)
    for step in plan:
        section = step.stage.name
        if step.done or step.name not in given or section not in ("midtrain", "sft"):
            continue
        rows, context = getattr(config, section).batch.row_tokens, given[step.name].context_tokens
        if rows > context:
            yield (
                f"{section}.batch.row_tokens={rows} is longer than the context of the model that {step.name} goes on "
                f"from: {context}. Give {section}.batch.row_tokens={context}"
            )


# Teachers


@dataclass(frozen=True, kw_only=True)
class TeacherSize:
    """What a teacher holds, in bytes."""

    weights: int
    """As its files have them."""
    kept_per_token: int
    """Of a micro-batch, until its loss is known: final states, or the keys and values of mlx-lm's cache."""
    working_per_token: int
    """Of a micro-batch, before there are logits: the numbers of one layer."""


def measure_teacher(folder: Path) -> TeacherSize:
    """Return what the model of a folder needs, as far as its files say."""
    record = _read_config(folder)
    width = _number(record, "hidden_size", "n_embd", "d_model") or 0
    layers = _number(record, "num_hidden_layers", "n_layer", "n_layers") or 0
    heads = _number(record, "num_attention_heads", "n_head") or 1
    head_width = _number(record, "head_dim") or width // heads
    keys_and_values = 2 * layers * head_width * (_number(record, "num_key_value_heads") or heads)
    whole = folder_of_weights(folder)
    inner = max(_FORWARD * width, 3 * (_number(record, "intermediate_size") or 0))
    is_ours = (folder / RANKS_FILE).is_file() and (folder / "checkpoint.json").is_file()
    return TeacherSize(
        weights=sum(path.stat().st_size for path in whole.glob("model*.safetensors")) if whole.is_dir() else 0,
        kept_per_token=_BYTES * (width if is_ours else keys_and_values),
        working_per_token=round(_BYTES * inner),
    )


def teacher_folder(teacher: TeacherConfig, outputs: Path) -> Path | None:
    """Return the folder of a teacher; None: there is none.

    Raises:
        StoreError: no artifact, or several, have its name.
    """
    if teacher.artifact is not None:
        store = Store(outputs)
        place = store.resolve(teacher.artifact)
        return store.find(read_manifest(place)["rid"]) or place  # an alias has no files of its own
    return None if teacher.path is None else Path(teacher.path)


def teacher_context(folder: Path) -> int | None:
    """Return the longest row that a teacher takes; None: its config.json does not say."""
    return _number(_read_config(folder), *_CONTEXT_KEYS)


def _teacher_problems(config: Config, plan: list[PlannedStep]) -> Iterator[str]:
    trained = any(step.stage.name == "tokenizer" for step in plan)
    waiting = {step.stage.name for step in plan if not step.done}
    for stage in ("midtrain", "sft"):
        section: FinetuneConfig = getattr(config, stage)
        if section.teacher.is_there and stage in waiting:
            yield from (f"{stage}.teacher: {line}" for line in _problems_of_teacher(config, section, trained))


def _problems_of_teacher(config: Config, section: FinetuneConfig, trained: bool) -> Iterator[str]:
    try:
        folder = teacher_folder(section.teacher, Path(config.outputs))
        assert folder is not None
        if is_adapter(folder):
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
            "are over other tokens. Distributions can only be learnt from a teacher with the same tokenizer; the "
            "answers of any other one can: mlxchat distill"
        )


def _vocab_size(folder: Path) -> int | None:
    """Return how many tokens a tokenizer.json has; None: it is missing, or of another kind."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        record = json.loads((folder / HF_FILE).read_text(encoding="utf-8"))
        return len({*record["model"]["vocab"].values(), *(token["id"] for token in record.get("added_tokens") or [])})
    return None


def _read_config(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if isinstance(record, dict):
            text = record.get("text_config")
            return {**text, **record} if isinstance(text, dict) else record
    return {}


def _number(record: dict[str, Any], *names: str) -> int | None:
    return next((value for name in names if isinstance(value := record.get(name), int) and value > 0), None)


# Local files


def check_local_files(config: Config, plan: Iterable[PlannedStep]) -> None:
    """Read all local files of the steps that are to run: conversations and text.

    Raises:
        DataError: with every line of every file that cannot be used.
    """
    sections = {name: getattr(config, name) for step in plan if not step.done for name in step.stage.config}
    faults: dict[str, list[str]] = {}
    for name, section in sections.items():
        for place, fault in _faults(name, section):
            faults.setdefault(fault, []).append(place)  # a mixture and its validation often share a file
    if faults:
        raise DataError("\n".join(f"{', '.join(places)}: {fault}" for fault, places in faults.items()))


def _faults(where: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the place in the configuration and the fault of every file that a section names."""
    if isinstance(value, TaskItem):
        if value.path is not None and (fault := _fault(repr(value), value.path, partial(load_item, value))):
            yield where, fault
    elif isinstance(value, CorpusConfig):
        for path in value.paths:
            if fault := _fault(path, path, partial(_read_text, path)):
                yield f"{where}.paths", fault
    elif is_dataclass(value):
        for field in fields(value):
            yield from _faults(f"{where}.{field.name}", getattr(value, field.name))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _faults(f"{where}.{key}", item)


def _read_text(path: str) -> None:
    for _ in read_file(Path(path)):
        pass


# The jobs of a sweep and the trials of a search are planned one after the other in one process.
_KNOWN: dict[tuple[str, tuple[int, ...]], str] = {}


def _fault(key: str, path: str, read: Callable[[], object]) -> str:
    """Return the message of the error that reading raises, "" if there is none; kept until the file changes."""
    stamp: tuple[int, ...] = ()
    with suppress(OSError):
        status = Path(path).stat()
        stamp = status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
    if (key, stamp) not in _KNOWN:
        try:
            read()
            _KNOWN[key, stamp] = ""
        except MlxchatError as error:
            _KNOWN[key, stamp] = str(error)
    return _KNOWN[key, stamp]
