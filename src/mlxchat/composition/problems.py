"""Finds impossible values in a configuration before anything runs."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from mlxchat.composition.sections import config_of, executor_of
from mlxchat.config.parts import is_own, load_part, part_file
from mlxchat.config.schema import (
    ADAMW_GROUPS,
    NO_ADAPTER,
    TRACKERS,
    BatchConfig,
    Config,
    ConversationConfig,
    ExecutorConfig,
    RewardConfig,
    RLConfig,
)
from mlxchat.data.sources import SUFFIXES
from mlxchat.data.vocabulary import problems_of_vocabulary
from mlxchat.errors import ConfigError, suggest
from mlxchat.model.sizes import NANOCHATS_HEAD_WIDTH, count_heads, find_adapter_problems, sizes_of
from mlxchat.runner.plan import roles_of
from mlxchat.runner.stage import Stages
from mlxchat.tasks import find_item_problems
from mlxchat.tasks.quickstart import licence_of


def find_problems(config: Config) -> list[str]:
    """Return a line for every impossible value, with what was expected; empty if there is none."""
    problems = _find_problems(config)
    stages = Stages(config.stages)
    for step, entry in config.pipeline.items():
        if not entry.get("with") or entry.get("stage") not in stages:
            continue
        where = f"pipeline.{step}.with"
        try:
            found = _find_problems(config_of(config, step, stages[entry["stage"]]))
        except ConfigError as error:
            problems += str(error).splitlines()
        else:
            problems += [f"{where}: {line}" for line in found if line not in problems]
    return problems


def _find_problems(config: Config) -> list[str]:
    of_model = [*find_bound_problems("model", config.model)] or [*_model(config)]
    found = [
        *of_model,
        *_adapters(config, model_is_good=not of_model),
        *_own_parts(config),
        *_corpus(config),
        *_pretrain(config),
        *_conversations("midtrain", config.midtrain, config),
        *_conversations("sft", config.sft, config),
        *_rl(config.rl),
        *_preference(config),
        *_evaluations(config),
        *_executors(config),
        *find_bound_problems("", config),
    ]
    for name in ("pretrain", "midtrain", "sft", "rl", "preference"):
        schedule = getattr(config, name).schedule
        if schedule.warmup_iterations is None and schedule.warmup_frac + schedule.warmdown_frac > 1:
            found.append(f"{name}.schedule: warmup_frac and warmdown_frac together are more than 1")
    # Stages take over the values of the group `adapter`, whose problems are reported once.
    of_groups = {line: re.sub(r"\w+\.adapter\.", "adapter.", line) for line in found}
    return [line for line, of_group in of_groups.items() if of_group == line or of_group not in of_groups]


def _model(config: Config) -> Iterator[str]:
    model, architecture = config.model, config.architecture
    width = model.depth * model.aspect_ratio
    if whole_heads := architecture.whole_heads:
        width = -(-width // model.head_width) * model.head_width
    if not architecture.window_pattern or set(architecture.window_pattern) - set("SL"):
        yield f'architecture.window_pattern is "{architecture.window_pattern}", expected letters S and L, such as SSSL'
    heads = count_heads(width, model.head_width)
    if width % heads or (width // heads) % 2 or model.head_width not in (width // heads, NANOCHATS_HEAD_WIDTH):
        expected = f"an even number that divides the width {width} (model.depth × model.aspect_ratio)"
        yield f"model.head_width is {model.head_width}, expected {'an even number' if whole_heads else expected}"
    elif model.num_kv_heads is not None and (model.num_kv_heads < 1 or heads % model.num_kv_heads):
        yield f"model.num_kv_heads={model.num_kv_heads} must divide the {heads} heads"
    for name in config.optimizer.adamw_groups:
        if name not in ADAMW_GROUPS:
            yield f'optimizer.adamw_groups: there is no parameter group "{name}".{suggest(name, ADAMW_GROUPS)}'


def _adapters(config: Config, *, model_is_good: bool) -> Iterator[str]:
    stages = {name: getattr(config, name).adapter for name in ("midtrain", "sft", "rl", "preference")}
    if config.adapter != NO_ADAPTER and not any(each.is_there for each in (config.adapter, *stages.values())):
        yield "adapter has settings, but there is no adapter. Choose adapter=lora, adapter=dora or adapter=qlora"
    # Sizes of existing models are known only when the plan is made.
    steps = config.pipeline.values()
    others = any(source.startswith(("import:", "artifact:")) for step in steps for source in roles_of(step).values())
    if model_is_good and not others and any(step.get("stage") == "pretrain" for step in steps):
        sizes = sizes_of(config.model, config.architecture, config.tokenizer.vocab_size)
        yield from find_adapter_problems("adapter", config.adapter, sizes)
        for name, adapter in stages.items():
            yield from find_adapter_problems(f"{name}.adapter", adapter, sizes)


def _own_parts(config: Config) -> Iterator[str]:
    parts = {f"eval.own.{name}": part for name, part in config.eval.own.items()}
    if is_own(kind := config.tracker.kind):
        parts["tracker.kind"] = kind
    elif kind not in TRACKERS:
        yield f'tracker.kind is "{kind}", expected {" or ".join(TRACKERS)}.{suggest(kind, TRACKERS)}'
    for key, part in parts.items():
        try:
            part_file(part)
        except ConfigError as error:
            yield f"{key}: {error}"


def _corpus(config: Config) -> Iterator[str]:
    corpus = config.corpus
    if not (corpus.packages or corpus.paths or corpus.hub):
        yield "the corpus has no source: give corpus.packages, corpus.paths or corpus.hub"
    if corpus.hub and (corpus.packages or corpus.paths):
        yield "corpus.hub cannot be mixed with corpus.packages or corpus.paths"
    for name in corpus.packages:
        try:
            licence_of(name)
        except ConfigError as error:
            yield f"corpus.packages: {error}"
    for path in corpus.paths:
        if Path(path).suffix not in SUFFIXES and not Path(path).is_dir():
            yield f"corpus.paths: {path} must be a folder or end in {', '.join(SUFFIXES)}"
    yield from problems_of_vocabulary(config.tokenizer.source, config.tokenizer.vocab_size, config.tokenizer.pattern)


def _pretrain(config: Config) -> Iterator[str]:
    pretrain = config.pretrain
    horizons = {key: getattr(pretrain, key) for key in ("num_iterations", "target_flops", "tokens_per_parameter")}
    given = [f"pretrain.{key}={value:g}" for key, value in horizons.items() if value is not None]
    if len(given) != 1:
        extra = " ".join(f"{each.partition('=')[0]}=null" for each in given[1:])
        yield (
            "exactly one of pretrain.num_iterations, pretrain.target_flops and pretrain.tokens_per_parameter must be "
            f"set; given: {', '.join(given) or 'none'}.{f' Add {extra}' if extra else ''}"
        )
    if pretrain.max_seconds is not None and pretrain.extend is not None:
        yield "pretrain.extend continues a schedule of iterations: give pretrain.max_seconds=null"
    yield from _batch("pretrain", pretrain.batch, config.model.context_tokens)
    if pretrain.batch.tokens is None and not config.optimizer.scaling:
        yield (
            "pretrain.batch.tokens is null, but optimizer.scaling, which would choose the batch, is false. Give "
            "pretrain.batch.tokens, or choose optimizer=muon_jul2026"
        )


def _conversations(name: str, section: ConversationConfig, config: Config) -> Iterator[str]:
    yield from _batch(name, section.batch, config.model.context_tokens)
    if section.teacher.path is not None and section.teacher.artifact is not None:
        yield f"{name}.teacher.path and {name}.teacher.artifact are both set: give one of them"
    yield from find_item_problems(f"{name}.mixture", section.mixture, training=True)
    if section.mixture_order is not None and sorted(section.mixture_order) != sorted(section.mixture):
        yield (
            f"{name}.mixture_order is [{', '.join(section.mixture_order)}], expected each task of {name}.mixture once "
            f"({', '.join(section.mixture)}), or null: shuffled"
        )
    yield from find_item_problems(f"{name}.validation", section.validation, training=False)
    if section.suite:
        yield from find_item_problems(f"{name}.suite", section.suite, training=False)
    if section.warm_start and section.adapter.is_there:
        yield (
            f"{name}.warm_start is true, but {name}.adapter.kind is {section.adapter.kind}: pretraining's moments "
            f"belong to other parameters. Give {name}.warm_start=false, or {name}.adapter.kind=none"
        )


def _batch(name: str, batch: BatchConfig, context_tokens: int) -> Iterator[str]:
    if batch.tokens is not None and batch.row_tokens > 1 and batch.tokens % batch.row_tokens:
        yield f"{name}.batch.tokens={batch.tokens} must be a multiple of {name}.batch.row_tokens={batch.row_tokens}"
    if batch.row_tokens > context_tokens:
        yield f"{name}.batch.row_tokens={batch.row_tokens} is longer than model.context_tokens={context_tokens}"


def _rl(rl: RLConfig) -> Iterator[str]:
    yield from find_item_problems("rl", {"task": rl.task}, training=True)
    yield from find_item_problems("rl", {"evaluation": rl.evaluation}, training=False)
    parts, questions = rl.minibatches_per_rollout, rl.questions_per_iteration
    if parts >= 1 and questions % parts:
        yield f"rl.questions_per_iteration={questions} must be a multiple of rl.minibatches_per_rollout={parts}"
    for name, reward in rl.rewards.items():
        yield from _reward(f"rl.rewards.{name}", reward)


def _reward(where: str, reward: RewardConfig) -> Iterator[str]:
    free, most = reward.free_tokens, reward.most_tokens
    if reward.kind == "length" and (free is None or most is None or not 0 <= free < most):
        yield f"{where}: free_tokens is {free} and most_tokens {most}, expected 0 <= free < most"
    try:
        if reward.kind == "format":
            re.compile(reward.pattern or "(")
        if reward.kind == "function":
            load_part(reward.function or "")
    except re.error as error:
        yield f"{where}.pattern is {reward.pattern}, expected a regular expression ({error})"
    except ConfigError as error:
        yield f"{where}.function: {error}"


def _preference(config: Config) -> Iterator[str]:
    preference = config.preference
    if not _has_stage(config, "preference"):
        return
    for name, training in (("data", True), ("validation", False)):
        item = getattr(preference, name)
        if item.task == "pairs" and item.path is None:
            yield (
                f"preference.{name}.path is null: give a file of pairs, or the task whose questions the model shall "
                f"answer, such as preference.{name}.task=arithmetic"
            )
        else:
            yield from find_item_problems("preference", {name: item}, training=training)
    if preference.adapter.is_there and preference.adapter.dropout > 0:
        yield (
            f"preference.adapter.dropout is {preference.adapter.dropout}, expected 0: the loss needs the "
            "log-probabilities of the whole model"
        )


def _evaluations(config: Config) -> Iterator[str]:
    for where, items in (("suite", config.suite), ("eval.base_tasks", config.eval.base_tasks)):
        yield from find_item_problems(where, items, training=False) if items else ()
    if config.outside.path is None and _has_stage(config, "outside"):
        yield "outside.path is null, but the pipeline evaluates a third-party model: give outside.path=FOLDER"
    imported = config.imported
    if _has_stage(config, "imported") and (imported.repository is None) == (imported.folder is None):
        yield "exactly one of imported.repository and imported.folder must be set"
    if config.sweep.metric is None and config.sweep.kind != "none":
        yield "sweep.metric has no value: give sweep.metric=STEP.METRIC, such as pretrain.val_bpb"


def _has_stage(config: Config, stage: str) -> bool:
    return any(step.get("stage") == stage for step in config.pipeline.values())


def _executors(config: Config) -> Iterator[str]:
    yield from _executor("executor", config.executor)
    for step in (step for step, entry in config.pipeline.items() if "executor" in entry):
        where = f"pipeline.{step}.executor"
        try:
            executor = executor_of(config, step)
        except ConfigError as error:
            yield from str(error).splitlines()
        else:
            yield from (*_executor(where, executor), *find_bound_problems(where, executor))


def _executor(where: str, executor: ExecutorConfig) -> Iterator[str]:
    gpus = (executor.gpus_per_node or "0").rpartition(":")[2]
    if executor.kind != "local" and gpus.isdigit() and int(gpus) > 1:
        yield (
            f"{where}.gpus_per_node is {executor.gpus_per_node}, but a job is one process, which computes on one GPU: "
            "give 1. For several: mlx.launch (docs/guides/several_machines.md)"
        )


_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "above": ("more than", operator.gt), "at_least": ("at least", operator.ge),
    "below": ("below", operator.lt), "at_most": ("at most", operator.le),
}  # fmt: skip


def find_bound_problems(key: str, section: Any) -> Iterator[str]:
    """Yield a line for each value outside the bounds in its field's metadata, and for each number that is not finite.

    Bounds are the keys of _BOUNDS, and one_of: the accepted values. null is always accepted where the type allows it.

    Args:
        key: dotted key of the section.
        section: a dataclass, or a mapping of dataclasses.
    """
    if isinstance(section, Mapping):
        for name, value in section.items():
            yield from find_bound_problems(f"{key}.{name}", value)
    for item in fields(section) if is_dataclass(section) else ():
        value, where, bounds = getattr(section, item.name), f"{key}.{item.name}".lstrip("."), item.metadata
        yield from find_bound_problems(where, value)
        if value is None:
            continue
        null = ", or null" if "None" in str(item.type) else ""
        if (known := bounds.get("one_of")) is not None and value not in known:
            named = [str(each) for each in known]
            last = "" if null else f" or {named.pop()}"
            hint = suggest(str(value), map(str, known))
            shown = f'"{value}"' if isinstance(value, str) else value
            yield f"{where} is {shown}, expected {', '.join(named)}{last}{null}.{hint}"
        if not all(holds(value, bounds[name]) for name, (_, holds) in _BOUNDS.items() if name in bounds):
            expected = " and ".join(f"{words} {bounds[name]}" for name, (words, _) in _BOUNDS.items() if name in bounds)
            yield f"{where} is {value}, expected {expected}{null}"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{where} is {value}, expected a finite number"
