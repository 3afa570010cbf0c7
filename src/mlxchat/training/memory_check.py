"""What a plan's trainings need, and which of them cannot fit: told before anything runs, without MLX."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from mlxchat.adapter_problems import adapter_sizes_of
from mlxchat.config import Config, MachineConfig, ModelConfig
from mlxchat.errors import ConfigError
from mlxchat.model.sizes import GPTSizes, sizes_of
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.progress import format_bytes
from mlxchat.training.given_sizes import find_given_sizes
from mlxchat.training.horizon import derive_hyperparameters, reference_sizes
from mlxchat.training.micro_batch import (
    MOST_TOKENS,
    Training,
    choose_micro_rows,
    count_ranks,
    find_device,
    rows_at_a_time,
)
from mlxchat.training.teacher_size import measure_teacher, teacher_folder, teachers_of

_NUM_REMEDIES = 3
# Depths that are suggested: those of nanochat's recipes and a few small ones.
_DEPTHS = (32, 26, 24, 20, 16, 12, 8, 6, 4, 2)
_LEAST_ROW_TOKENS, _LEAST_VOCABULARY = 64, 512


def describe_memory(config: Config, plan: Iterable[PlannedStep]) -> dict[str, str]:
    """Return step → predicted peak and micro-batch of the plan's trainings that are to run, for people."""
    lines, plan = {}, list(plan)
    given = find_given_sizes(config, plan)
    for step in plan:
        training = None if step.done else training_of(config, step.stage.name, given.get(step.name))
        if training is not None:
            rows = rows_at_a_time(training, config.machine)
            needed = _need(training, rows or 1)
            needed += f" on each of {training.num_ranks} ranks" if training.num_ranks > 1 else ""
            lines[step.name] = needed if rows else "does not fit"
    return lines


def check_memory(config: Config, plan: Iterable[PlannedStep]) -> None:
    """Refuse a plan with trainings that cannot fit.

    Raises:
        ConfigError: with the first one's predicted peak, the limit, and three settings with which it would fit, each
            with its number.
    """
    refused: dict[str, str] = {}
    plan = list(plan)
    given = find_given_sizes(config, plan)
    for step in plan:
        training = None if step.done else training_of(config, step.stage.name, given.get(step.name))
        if training is None or rows_at_a_time(training, config.machine):
            continue
        asked = config.machine.device_batch_tokens or 1
        rows = min(training.own_rows, max(1, asked // training.row_tokens))
        remedies = list(islice(_remedies(config, step.stage.name, given.get(step.name)), _NUM_REMEDIES))
        lines = [f"  {setting} → {needed}" for setting, needed in remedies]
        what = "It would fit with any one of these:" if lines else "Nothing that was tried makes it fit."
        refused[step.name] = "\n".join([f"{step.name} {training.explain_excess(rows)}. {what}", *lines])
    if refused:
        first, *others = refused
        more = f"\nToo large as well: {', '.join(others)}." if others else ""
        raise ConfigError(refused[first] + more)


def training_of(config: Config, stage: str, sizes: GPTSizes | None = None) -> Training | None:
    """Return what the memory of a stage's training depends on, as far as the configuration says; None: no training.

    Args:
        config: the whole one.
        stage: its name.
        sizes: of a model that was taken in; None: those of the configuration.

    Raises:
        ConfigError: its adapters do not fit the model.
    """
    if stage not in ("pretrain", "midtrain", "sft", "rl"):
        return None
    sizes = sizes or sizes_of(config.model, config.architecture, config.tokenizer.vocab_size)
    teacher, adapters = None, None
    if stage != "pretrain":
        adapters = adapter_sizes_of(f"{stage}.adapter", getattr(config, stage).adapter, sizes)
    if stage == "pretrain":
        row_tokens = config.pretrain.batch.row_tokens
        rows = _pretraining_tokens(config, sizes) // row_tokens
    elif stage == "rl":
        # Samples may be as long as the context, seldom are.
        row_tokens = sizes.context_tokens
        rows = config.rl.questions_per_iteration * config.rl.samples_per_question
    else:
        batch = (config.midtrain if stage == "midtrain" else config.sft).batch
        row_tokens = batch.row_tokens
        if stage in (taught := teachers_of(config)):
            folder = teacher_folder(taught[stage].teacher, Path(config.outputs))
            teacher = None if folder is None else measure_teacher(folder)
        rows = (batch.tokens or _pretraining_tokens(config, sizes)) // row_tokens
    return Training(
        sizes=sizes, optimizer=config.optimizer, rows=max(1, rows), row_tokens=row_tokens,
        recompute=config.machine.grad_checkpointing, device=find_device(config.machine),
        # RL's frozen reference is as large.
        keeps_best=(stage == "pretrain" and config.pretrain.keep == "best")
        or (stage == "rl" and config.rl.kl_coefficient > 0),
        teacher=teacher, samples=stage == "rl", adapters=adapters, num_ranks=count_ranks(config.machine)[0],
    )  # fmt: skip


def _pretraining_tokens(config: Config, sizes: GPTSizes) -> int:
    """Return the tokens of one of pretraining's iterations."""
    reference = reference_sizes(config.model, config.architecture, config.optimizer, sizes.vocab_size)
    return derive_hyperparameters(config.pretrain, config.optimizer, sizes, reference).batch_tokens


def _remedies(config: Config, stage: str, sizes: GPTSizes | None) -> Iterator[tuple[str, str]]:
    """Yield settings with which a stage's training fits, and its predicted peak: those that change no result first.

    What is not enough alone comes together with others.
    """
    machine = config.machine
    free = replace(machine, device_batch_tokens=None)
    alone: dict[str, MachineConfig] = {}
    if machine.device_batch_tokens is not None:
        alone["machine.device_batch_tokens=null"] = free
    if not machine.grad_checkpointing:
        alone["machine.grad_checkpointing=true"] = replace(free, grad_checkpointing=True)
    if find_device(machine).num_lanes > 1:
        alone["machine.blas_threads=1"] = replace(free, blas_threads=1)
    if machine.memory_limit_bytes is not None:
        alone["machine.memory_limit_bytes=null"] = replace(free, memory_limit_bytes=None)
    for setting, changed in alone.items():
        if need := _need_if_it_fits(replace(config, machine=changed), stage, sizes):
            yield setting, need
    if stage == "rl" and config.rl.kl_coefficient > 0:  # the frozen reference is as large as the model
        changed_rl = replace(config, machine=free, rl=replace(config.rl, kl_coefficient=0.0))
        if need := _need_if_it_fits(changed_rl, stage, sizes):
            yield "rl.kl_coefficient=0", need
    if stage in (taught := teachers_of(config)):
        untaught = replace(taught[stage].teacher, path=None, artifact=None)
        without: dict[str, Any] = {stage: replace(taught[stage], teacher=untaught)}
        key = "path" if taught[stage].teacher.artifact is None else "artifact"
        if need := _need_if_it_fits(replace(config, machine=free, **without), stage, sizes):
            yield f"{stage}.teacher.{key}=null", need
    least, settings = replace(free, grad_checkpointing=True, blas_threads=1), " machine.grad_checkpointing=true"
    if "machine.blas_threads=1" in alone:
        settings += " machine.blas_threads=1"
    named = set()
    of_model = () if sizes else (_shallower_models, _narrower_models, _smaller_vocabularies)  # it has the sizes it has
    for changes in (_shorter_rows, *of_model):
        tried = (
            (f"{setting}{more}", _need_if_it_fits(changed, stage, sizes))
            for together, more in ((free, ""), (least, settings))
            for setting, changed in changes(replace(config, machine=together), stage)
        )
        if remedy := next(((setting, need) for setting, need in tried if need), None):
            named.add(remedy[0])
            yield remedy
    for setting, shallower in () if sizes else _shallower_models(replace(config, machine=free), stage):
        if setting not in named and (need := _need_if_it_fits(shallower, stage, sizes)):
            yield setting, need


def _need_if_it_fits(config: Config, stage: str, sizes: GPTSizes | None) -> str:
    """Return what a training that fits needs, as `plan` says it; empty if it does not fit."""
    training = training_of(config, stage, sizes)
    assert training is not None, "only trainings are refused"
    rows = choose_micro_rows(training, MOST_TOKENS[training.device.kind])
    return _need(training, rows) if rows else ""


def _need(training: Training, rows: int) -> str:
    return f"{format_bytes(training.peak_bytes(rows))} with {rows * training.row_tokens:,} tokens at a time"


def _shorter_rows(config: Config, stage: str) -> Iterator[tuple[str, Config]]:
    if stage == "rl":
        return
    section = getattr(config, stage)
    row_tokens = section.batch.row_tokens // 2
    while row_tokens >= _LEAST_ROW_TOKENS and not (section.batch.tokens or 0) % row_tokens:
        changed = replace(section, batch=replace(section.batch, row_tokens=row_tokens))
        yield f"{stage}.batch.row_tokens={row_tokens}", replace(config, **{stage: changed})
        row_tokens //= 2


def _shallower_models(config: Config, stage: str) -> Iterator[tuple[str, Config]]:
    for depth in _DEPTHS:
        if depth < config.model.depth and _has_whole_heads(changed := replace(config.model, depth=depth)):
            yield f"model.depth={depth}", replace(config, model=changed)


def _narrower_models(config: Config, stage: str) -> Iterator[tuple[str, Config]]:
    for aspect_ratio in range(config.model.aspect_ratio - 8, 0, -8):
        if _has_whole_heads(changed := replace(config.model, aspect_ratio=aspect_ratio)):
            yield f"model.aspect_ratio={aspect_ratio}", replace(config, model=changed)


def _has_whole_heads(model: ModelConfig) -> bool:
    return (model.depth * model.aspect_ratio) % model.head_width == 0


def _smaller_vocabularies(config: Config, stage: str) -> Iterator[tuple[str, Config]]:
    if config.tokenizer.source != "train":  # it has the size it has
        return
    vocab_size = config.tokenizer.vocab_size // 2
    while vocab_size >= _LEAST_VOCABULARY:
        changed = replace(config, tokenizer=replace(config.tokenizer, vocab_size=vocab_size))
        yield f"tokenizer.vocab_size={vocab_size}", changed
        vocab_size //= 2
