"""Finds impossible values in a configuration before anything runs."""

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from mlxchat.composition.sections import config_of, executor_of
from mlxchat.config.pins import is_own, load_part, part_file
from mlxchat.config.schema import NO_ADAPTER, TRACKERS, BatchConfig, Config, ConversationConfig, ExecutorConfig
from mlxchat.data.sources import SUFFIXES
from mlxchat.data.vocabulary import problems_of_vocabulary
from mlxchat.errors import ConfigError, suggest
from mlxchat.model.sizes import NANOCHATS_HEAD_WIDTH, count_heads
from mlxchat.runner.stage import Stages
from mlxchat.tasks import find_item_problems
from mlxchat.tasks.quickstart import licence_of

_TRAININGS = ("pretrain", "midtrain", "sft", "rl", "preference")


def find_problems(config: Config) -> list[str]:
    """Return a line for every impossible value, with what was expected; empty if there is none."""
    problems = _find_problems(config)
    stages = Stages(config.stages)
    for step, entry in config.pipeline.items():
        try:
            if "executor" in entry:
                where, executor = f"pipeline.{step}.executor", executor_of(config, step)
                problems += [*find_bound_problems(where, executor), *_executor(where, executor)]
            if entry.get("with") and entry.get("stage") in stages:
                found = _find_problems(config_of(config, step, stages[entry["stage"]]))
                problems += [f"pipeline.{step}.with: {line}" for line in found if line not in problems]
        except ConfigError as error:
            problems += str(error).splitlines()
    return problems


def _find_problems(config: Config) -> list[str]:
    of_model = [*find_bound_problems("model", config.model)]
    found = [
        *([] if of_model else _model(config)),
        *_corpus(config),
        *_pretrain(config),
        *_schedules(config),
        *_conversations("midtrain", config.midtrain, config),
        *_conversations("sft", config.sft, config),
        *_rl(config),
        *_preference(config),
        *_evaluations(config),
        *_elsewhere(config),
        *find_bound_problems("", config),
    ]
    # Stages take over the values of the group `adapter`, whose problems are reported once.
    of_groups = {line: re.sub(r"\w+\.adapter\.", "adapter.", line) for line in found}
    return [line for line, of_group in of_groups.items() if of_group == line or of_group not in of_groups]


def _model(config: Config) -> Iterator[str]:
    model, architecture = config.model, config.architecture
    width = model.depth * model.aspect_ratio
    if architecture.whole_heads:
        width = -(-width // model.head_width) * model.head_width
    heads = count_heads(width, model.head_width)
    if set(architecture.window_pattern) not in ({"S"}, {"L"}, {"S", "L"}):
        yield f'architecture.window_pattern is "{architecture.window_pattern}", expected letters S and L, such as SSSL'
    if width % heads or (width // heads) % 2 or model.head_width not in (width // heads, NANOCHATS_HEAD_WIDTH):
        divides = "" if architecture.whole_heads else f" that divides the width {width} (depth × aspect_ratio)"
        yield f"model.head_width is {model.head_width}, expected an even number{divides}"
    elif model.num_kv_heads is not None and (model.num_kv_heads < 1 or heads % model.num_kv_heads):
        yield f"model.num_kv_heads={model.num_kv_heads} must divide the {heads} heads"


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
        three = "pretrain.num_iterations, pretrain.target_flops and pretrain.tokens_per_parameter"
        yield f"exactly one of {three} must be set, the others null; given: {', '.join(given) or 'none'}"
    if pretrain.max_seconds is not None and pretrain.extend is not None:
        yield "pretrain.extend continues a schedule of iterations: give pretrain.max_seconds=null"
    yield from _batch("pretrain", pretrain.batch, config.model.context_tokens)
    if pretrain.batch.tokens is None and not config.optimizer.scaling:
        yield "pretrain.batch.tokens is null, but optimizer.scaling is false: give it, or optimizer=muon_jul2026"


def _batch(name: str, batch: BatchConfig, context_tokens: int) -> Iterator[str]:
    if batch.tokens is not None and batch.row_tokens > 1 and batch.tokens % batch.row_tokens:
        yield f"{name}.batch.tokens={batch.tokens} must be a multiple of {name}.batch.row_tokens={batch.row_tokens}"
    if batch.row_tokens > context_tokens:
        yield f"{name}.batch.row_tokens={batch.row_tokens} is longer than model.context_tokens={context_tokens}"


def _schedules(config: Config) -> Iterator[str]:
    for name in _TRAININGS:
        schedule = getattr(config, name).schedule
        if schedule.warmup_iterations is None and schedule.warmup_frac + schedule.warmdown_frac > 1:
            yield f"{name}.schedule: warmup_frac and warmdown_frac together are more than 1"
    adapters = [config.adapter, *(getattr(config, name).adapter for name in _TRAININGS[1:])]
    if config.adapter != NO_ADAPTER and not any(each.is_there for each in adapters):
        yield "adapter has settings, but there is no adapter. Choose adapter=lora, adapter=dora or adapter=qlora"


def _conversations(name: str, section: ConversationConfig, config: Config) -> Iterator[str]:
    yield from _batch(name, section.batch, config.model.context_tokens)
    yield from find_item_problems(f"{name}.mixture", section.mixture, training=True)
    yield from find_item_problems(f"{name}.validation", section.validation, training=False)
    yield from find_item_problems(f"{name}.suite", section.suite, training=False) if section.suite else ()
    if section.mixture_order is not None and sorted(section.mixture_order) != sorted(section.mixture):
        yield f"{name}.mixture_order: expected each task of {name}.mixture once ({', '.join(section.mixture)}), or null"
    if section.warm_start and section.adapter.is_there:
        yield f"{name}.warm_start is true, but {name}.adapter.kind is {section.adapter.kind}, whose moments are others"


def _rl(config: Config) -> Iterator[str]:
    rl = config.rl
    yield from find_item_problems("rl", {"task": rl.task}, training=True)
    yield from find_item_problems("rl", {"evaluation": rl.evaluation}, training=False)
    parts, questions = rl.minibatches_per_rollout, rl.questions_per_iteration
    if parts >= 1 and questions % parts:
        yield f"rl.questions_per_iteration={questions} must be a multiple of rl.minibatches_per_rollout={parts}"
    for name, reward in rl.rewards.items():
        where, free, most = f"rl.rewards.{name}", reward.free_tokens, reward.most_tokens
        if reward.kind == "length" and (free is None or most is None or not 0 <= free < most):
            yield f"{where}: free_tokens is {free} and most_tokens {most}, expected 0 <= free < most"
        try:
            if reward.kind == "format":
                re.compile(reward.pattern or "(")
            if reward.kind == "function":
                load_part(reward.function or "")
        except (re.error, ConfigError) as error:
            yield f"{where}: {error}"


def _preference(config: Config) -> Iterator[str]:
    preference = config.preference
    if not _has_stage(config, "preference"):
        return
    for name, training in (("data", True), ("validation", False)):
        item = getattr(preference, name)
        if item.task == "pairs" and item.path is None:
            yield f"preference.{name}.path is null: give a file of pairs, or a task, as {name}.task=arithmetic"
        else:
            yield from find_item_problems("preference", {name: item}, training=training)
    if preference.adapter.is_there and preference.adapter.dropout > 0:
        yield "preference.adapter.dropout must be 0: the loss needs the log-probabilities of the whole model"


def _evaluations(config: Config) -> Iterator[str]:
    for where, items in (("suite", config.suite), ("eval.base_tasks", config.eval.base_tasks)):
        yield from find_item_problems(where, items, training=False) if items else ()
    if config.outside.path is None and _has_stage(config, "outside"):
        yield "outside.path is null, but the pipeline evaluates a third-party model: give outside.path=FOLDER"
    imported = config.imported
    if _has_stage(config, "imported") and (imported.repository is None) == (imported.folder is None):
        yield "exactly one of imported.repository and imported.folder must be set"
    for name, part in config.eval.own.items():
        yield from _part_problems(f"eval.own.{name}", part)


def _elsewhere(config: Config) -> Iterator[str]:
    yield from _executor("executor", config.executor)
    kind = config.tracker.kind
    if is_own(kind):
        yield from _part_problems("tracker.kind", kind)
    elif kind not in TRACKERS:
        yield f'tracker.kind is "{kind}", expected {" or ".join(TRACKERS)}.{suggest(kind, TRACKERS)}'
    if config.sweep.metric is None and config.sweep.kind != "none":
        yield "sweep.metric has no value: give sweep.metric=STEP.METRIC, such as pretrain.val_bpb"


def _has_stage(config: Config, stage: str) -> bool:
    return any(step.get("stage") == stage for step in config.pipeline.values())


def _part_problems(key: str, part: str) -> Iterator[str]:
    try:
        part_file(part)
    except ConfigError as error:
        yield f"{key}: {error}"


def _executor(where: str, executor: ExecutorConfig) -> Iterator[str]:
    gpus = (executor.gpus_per_node or "0").rpartition(":")[2]
    if executor.kind != "local" and gpus.isdigit() and int(gpus) > 1:
        why = "a job is one process, which computes on one GPU: give 1. For several: mlx.launch"
        yield f"{where}.gpus_per_node is {executor.gpus_per_node}, but {why} (docs/guides/several_machines.md)"


_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "above": ("more than", operator.gt), "at_least": ("at least", operator.ge),
    "below": ("below", operator.lt), "at_most": ("at most", operator.le),
}  # fmt: skip


def find_bound_problems(key: str, section: Any) -> Iterator[str]:
    """Yield a line for each value outside the bounds in its field's metadata, and for each number that is not finite.

    Bounds are the keys of _BOUNDS, and one_of: the accepted values. null is always accepted where the type allows it.
    `key` is that of the section, a dataclass or a mapping of them.
    """
    if isinstance(section, Mapping):
        for name, value in section.items():
            yield from find_bound_problems(f"{key}.{name}", value)
    for item in fields(section) if is_dataclass(section) else ():
        value, where, bounds = getattr(section, item.name), f"{key}.{item.name}".lstrip("."), item.metadata
        yield from find_bound_problems(where, value)
        if value is None:
            continue
        known = [str(each) for each in bounds.get("one_of", ())]
        if known and str(value) not in known:
            shown = f'"{value}"' if isinstance(value, str) else value
            accepted = [*known, "null"] if "None" in str(item.type) else known
            yield f"{where} is {shown}, expected one of {', '.join(accepted)}.{suggest(str(value), known)}"
        if not all(holds(value, bounds[name]) for name, (_, holds) in _BOUNDS.items() if name in bounds):
            expected = [f"{words} {bounds[name]}" for name, (words, _) in _BOUNDS.items() if name in bounds]
            yield f"{where} is {value}, expected {' and '.join(expected)}"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{where} is {value}, expected a finite number"
