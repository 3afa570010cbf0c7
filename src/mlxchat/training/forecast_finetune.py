"""The forecast of a fine-tuning: its memory, and whether model and teacher fit. Imports no MLX."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from mlxchat.config.schema import Config, FinetuneConfig, OptimizerConfig, TeacherConfig
from mlxchat.data.vocabulary import HF_FILE, RANKS_FILE
from mlxchat.errors import MlxchatError
from mlxchat.model.adapter_problems import adapter_remedies, adapter_sizes_of
from mlxchat.model.sizes import GPTSizes, sizes_of
from mlxchat.ops.machine import DECODED_ROWS
from mlxchat.planning.horizon import count_later_iterations, derive_hyperparameters
from mlxchat.planning.memory import TeacherSize, Training
from mlxchat.runner.plan import PlannedStep
from mlxchat.store.bases import find_chain, folder_of_weights, is_adapter
from mlxchat.store.manifest import Manifest
from mlxchat.store.naming import resolve
from mlxchat.store.store import SAVED, Store
from mlxchat.tasks import task_class
from mlxchat.training.extension import find_extension_problems, keeps_state

# What weights, moments or the position in the data depend on.
_SAME = (
    "mixture",
    "mixture_order",
    "context_tokens",
    "packing",
    "packing_buffer_conversations",
    "batch.row_tokens",
    "adapter",
)
# Numbers per token and channel of a teacher's forward pass, one layer at a time.
_FORWARD = 20.0
_BYTES = 4
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")


def memory(config: Config, stage: str, sizes: GPTSizes) -> Training:
    """Return what the memory of a fine-tuning depends on, its batch as large as pretraining's where none is given."""
    section: FinetuneConfig = getattr(config, stage)
    tokens = section.batch.tokens or derive_hyperparameters(config, sizes).batch_tokens
    folder = teacher_folder(section.teacher, Path(config.outputs)) if section.teacher.is_there else None
    teacher = None if folder is None else measure_teacher(folder)
    return describe(stage, section, config.optimizer, sizes, tokens // section.batch.row_tokens, teacher)


def sizes_after(config: Config, stage: str, sizes: GPTSizes | None) -> GPTSizes | None:
    """Return the sizes of the trained model; `sizes` are those before it (None: the configuration's)."""
    tokens = getattr(config, stage).context_tokens
    if tokens is None:
        return sizes
    sizes = sizes or _sizes_of(config)
    return sizes.lengthened(max(tokens, sizes.context_tokens))


def _sizes_of(config: Config) -> GPTSizes:
    return sizes_of(config.model, config.architecture, config.tokenizer.vocab_size)


def describe(
    stage: str,
    section: FinetuneConfig,
    optimizer: OptimizerConfig,
    sizes: GPTSizes,
    rows: int,
    teacher: TeacherSize | None,
) -> Training:
    """Return what the memory of iterations of `rows` rows depends on."""
    adapters = adapter_sizes_of(f"{stage}.adapter", section.adapter, sizes)
    answers = any(task_class(item.task).kind == "generative" for item in section.suite.values())
    remedies = (f"no {stage}.teacher",) if teacher is not None else adapter_remedies(stage, adapters)
    return Training(
        sizes=sizes, optimizer=optimizer, rows=max(1, rows), row_tokens=section.batch.row_tokens, adapters=adapters,
        teacher=teacher, sampled_rows=DECODED_ROWS if answers else 0,
        sampled_tokens=sizes.context_tokens + section.suite_max_new_tokens,
        remedies=(*remedies, f"a smaller {stage}.batch.row_tokens"),
    )  # fmt: skip


def problems(config: Config, step: PlannedStep, plan: list[PlannedStep], sizes: GPTSizes | None) -> Iterator[str]:
    """Yield why a step cannot extend its training, start from its model and moments, or learn from its teacher."""
    stage = step.stage.name
    section: FinetuneConfig = getattr(config, stage)
    yield from find_extension_problems(
        step, plan, same=("seed", "optimizer.kind", "optimizer.variant", *(f"{stage}.{name}" for name in _SAME)),
        count_wanted=partial(_count_wanted, section, step.artifacts.get("extends")),
    )  # fmt: skip
    if section.warm_start:
        yield from _warm_start_problems(config, step, plan)
    rows, wanted = section.batch.row_tokens, section.context_tokens
    context = (sizes or _sizes_of(config)).context_tokens
    if wanted is not None and wanted < context:
        yield (
            f"{stage}.context_tokens={wanted} is shorter than the context of the model that {step.name} starts from: "
            f"{context}. Give at least that, or null"
        )
    elif wanted is not None and rows != wanted:
        yield (
            f"{stage}.context_tokens={wanted}, but rows have {rows} tokens, and later positions are not trained: "
            f"give {stage}.batch.row_tokens={wanted}"
        )
    elif rows > context:
        yield (
            f"{stage}.batch.row_tokens={rows} is longer than the context of the model that {step.name} starts from: "
            f"{context}. Set {stage}.batch.row_tokens={context}, or extend it by {stage}.context_tokens={rows}"
        )
    if section.teacher.is_there:
        trained = any(each.stage.produces == "tokenizer" for each in plan)
        yield from (f"{stage}.teacher: {line}" for line in _teacher_problems(config, section, trained))


def _count_wanted(section: FinetuneConfig, extended: Manifest | None, derived: Mapping[str, Any]) -> int | None:
    tokens = section.batch.tokens
    if tokens is None and extended is not None and extended["config"][extended["stage"]]["batch"]["tokens"] is None:
        tokens = derived["tokens_per_iteration"]  # pretraining's, in both
    if tokens is None:
        return section.num_iterations
    rows = max(1, tokens // section.batch.row_tokens)
    return count_later_iterations(section, derived["rows_per_epoch"], rows)


def _warm_start_problems(config: Config, step: PlannedStep, plan: list[PlannedStep]) -> Iterator[str]:
    source = next((each for each in plan if each.name == step.inputs.get("checkpoint")), None)
    made = step.artifacts.get("checkpoint")
    if source is not None and source.done:
        made = Store(Path(config.outputs)).made(source.key)
    if made is not None and not keeps_state(made):
        remedy = (
            f"Train it again with {made['stage']}.save_training_state=true 'force=[{made['step'].partition(SAVED)[0]}]'"
        )
        if made["stage"] == "imported":
            remedy = "Import it again with its optimizer: mlxchat import nanochat WHAT --optimizer"
        yield (
            f"{step.stage.name}.warm_start is true, but {made['name']} was made without a training state. {remedy}, or "
            f"give {step.stage.name}.warm_start=false"
        )


# Teachers


def measure_teacher(folder: Path) -> TeacherSize:
    """Return the memory of the model in a folder, from its files."""
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
        return resolve(Store(outputs), teacher.artifact)
    return None if teacher.path is None else Path(teacher.path)


def teacher_context(folder: Path) -> int | None:
    """Return the longest row that a teacher takes; None: not in its config.json."""
    return _number(_read_config(folder), *_CONTEXT_KEYS)


def _teacher_problems(config: Config, section: FinetuneConfig, trained: bool) -> Iterator[str]:
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
            "are over other tokens. Give a teacher with the same tokenizer, or train on the teacher's answers: "
            "mlxchat distill"
        )


def _vocab_size(folder: Path) -> int | None:
    """Return how many tokens a tokenizer.json has; None: it is missing or unreadable."""
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
