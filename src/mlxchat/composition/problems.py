"""Finds impossible values in a configuration before anything runs."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from mlxchat.composition.sections import config_of, executor_of
from mlxchat.config.parts import is_own, load_part, part_file
from mlxchat.config.schema import (
    ADAMW_GROUPS,
    NO_ADAPTER,
    BatchConfig,
    Config,
    ConversationConfig,
    ExecutorConfig,
    OptimizerConfig,
    RewardConfig,
    RLConfig,
    ScheduleConfig,
)
from mlxchat.data.sources import SUFFIXES
from mlxchat.data.vocabulary import problems_of_vocabulary
from mlxchat.errors import ConfigError, suggest
from mlxchat.model.sizes import NANOCHATS_HEAD_WIDTH, count_heads, find_adapter_problems, sizes_of
from mlxchat.runner.plan import Pipeline, roles_of
from mlxchat.runner.stage import Stages
from mlxchat.store.fingerprint import flatten, plain_of
from mlxchat.tasks import find_item_problems
from mlxchat.tasks.quickstart import licence_of

_POLAR_EXPRESS_ITERATIONS = 5


def find_problems(config: Config) -> list[str]:
    """Return a line for every impossible value, with what was expected; empty if there is none."""
    steps = {step: entry for step, entry in config.pipeline.items() if not entry.get("with")}
    problems = _find_problems(config, steps)
    stages = Stages(config.stages)
    for step, entry in config.pipeline.items():
        if step in steps or entry.get("stage") not in stages:
            continue
        try:
            own = config_of(config, step, stages[entry["stage"]])
        except ConfigError as error:
            problems += str(error).splitlines()
        else:
            found = _find_problems(own, {step: entry})
            problems += [f"pipeline.{step}.with: {line}" for line in found if line not in problems]
    return problems


def _find_problems(config: Config, steps: Pipeline) -> list[str]:
    """Return the problems of the settings of these steps."""
    of_model = [*find_bound_problems("model", config.model)] or [*_model(config)]
    found = [
        *of_model,
        *_adapters(config, model_is_good=not of_model),
        *_own_parts(config),
        *_corpus(config),
        *_pretrain(config),
        *_finetune("midtrain", config.midtrain, config, steps),
        *_finetune("sft", config.sft, config, steps),
        *_schedule("rl", config.rl.schedule),
        *find_rl_problems(config.rl),
        *_preference(config, steps),
        *(find_item_problems("suite", config.suite, training=False) if config.suite else ()),
        *(find_item_problems("eval.base_tasks", items, training=False) if (items := config.eval.base_tasks) else ()),
        *_eval(config),
        *_imported(config),
        *_optimizer(config.optimizer),
        *_sweep(config),
        *find_bound_problems("", config),
        *_execution(config),
    ]
    # Stages take over the values of the group `adapter`, whose problems are reported once.
    found = [
        line
        for line in dict.fromkeys(found)
        if (group := re.sub(r"\w+\.adapter\.", "adapter.", line)) == line or group not in found
    ]
    return [*found, *find_unbounded(config, found)]


def _execution(config: Config) -> Iterator[str]:
    yield from _executor("executor", config.executor)
    for step in (step for step, entry in config.pipeline.items() if "executor" in entry):
        where = f"pipeline.{step}.executor"
        try:
            yield from _executor(where, executor_of(config, step))
            yield from find_bound_problems(where, executor_of(config, step))
        except ConfigError as error:
            yield from str(error).splitlines()
    for key in ("rows", "prompt_tokens"):
        if min(counts := getattr(config.bench, key), default=0) < 1:
            yield f"bench.{key} is {counts}, expected one or more numbers of at least 1"


def _executor(where: str, executor: ExecutorConfig) -> Iterator[str]:
    gpus = (executor.gpus_per_node or "0").rpartition(":")[2]
    if executor.kind == "ray" and not gpus.isdigit():
        yield f"{where}.gpus_per_node is {executor.gpus_per_node}, expected a whole number for Ray"
    if executor.kind != "local" and gpus.isdigit() and int(gpus) > 1:
        yield (
            f"{where}.gpus_per_node is {executor.gpus_per_node}, but a job is one process, which computes on one GPU: "
            "give 1. For several: mlx.launch (docs/guides/several_machines.md)"
        )


def _adapters(config: Config, *, model_is_good: bool) -> Iterator[str]:
    stages = {"midtrain": config.midtrain.adapter, "sft": config.sft.adapter, "rl": config.rl.adapter,
              "preference": config.preference.adapter}  # fmt: skip
    unused = [name for name in vars(NO_ADAPTER) if getattr(config.adapter, name) != getattr(NO_ADAPTER, name)]
    if unused and not any(each.is_there for each in (config.adapter, *stages.values())):
        keys = ", ".join(unused)
        yield f"adapter: {keys} set, but there is no adapter. Choose adapter=lora, adapter=dora or adapter=qlora"
    # Sizes of existing models are known only when the plan is made.
    steps = config.pipeline.values()
    others = any(source.startswith(("import:", "artifact:")) for step in steps for source in roles_of(step).values())
    if model_is_good and not others and any(step.get("stage") == "pretrain" for step in steps):
        sizes = sizes_of(config.model, config.architecture, config.tokenizer.vocab_size)
        yield from find_adapter_problems("adapter", config.adapter, sizes)
        for name, adapter in stages.items():
            yield from find_adapter_problems(f"{name}.adapter", adapter, sizes)


def _model(config: Config) -> Iterator[str]:
    model = config.model
    architecture = config.architecture
    width = model.depth * model.aspect_ratio
    if whole_heads := architecture.whole_heads:
        width = -(-width // model.head_width) * model.head_width
    if not 0 <= architecture.dropout < 1:
        yield f"architecture.dropout is {architecture.dropout}, expected at least 0 (off) and below 1"
    if not architecture.window_pattern or set(architecture.window_pattern) - set("SL"):
        yield f'architecture.window_pattern is "{architecture.window_pattern}", expected letters S and L, such as SSSL'
    if architecture.smear and width < 24:
        yield f"architecture.smear needs a width of at least 24, got {width}"
    heads = count_heads(width, model.head_width)
    if width % heads or (width // heads) % 2 or model.head_width not in (width // heads, NANOCHATS_HEAD_WIDTH):
        expected = f"an even number that divides the width {width} (model.depth × model.aspect_ratio)"
        yield f"model.head_width is {model.head_width}, expected {'an even number' if whole_heads else expected}"
    elif model.num_kv_heads is not None and (model.num_kv_heads < 1 or heads % model.num_kv_heads):
        yield f"model.num_kv_heads={model.num_kv_heads} must divide the {heads} heads"


def _own_parts(config: Config) -> Iterator[str]:
    parts = {f"eval.own.{name}": part for name, part in config.eval.own.items()}
    if is_own(config.tracker.kind):
        parts["tracker.kind"] = config.tracker.kind
    elif config.tracker.kind not in (known := ("none", "wandb", "trackio", "tensorboard")):
        hint = suggest(config.tracker.kind, known)
        yield f'tracker.kind is "{config.tracker.kind}", expected {" or ".join(known)}.{hint}'
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
    if corpus.hub and not re.fullmatch(r"[\w.-]+/[\w.-]+", corpus.hub.repository):
        yield f'corpus.hub.repository is "{corpus.hub.repository}", expected <organisation>/<name>, such as org/texts'
    for name in corpus.packages:
        try:
            licence_of(name)
        except ConfigError as error:
            yield f"corpus.packages: {error}"
    for path in corpus.paths:
        if Path(path).suffix not in SUFFIXES and not Path(path).is_dir():
            yield f"corpus.paths: {path} must be a folder or end in {', '.join(SUFFIXES)}"
    yield from problems_of_vocabulary(config.tokenizer.source, config.tokenizer.vocab_size)


def _pretrain(config: Config) -> Iterator[str]:
    pretrain = config.pretrain
    horizons = {
        key: getattr(pretrain, key)
        for key in ("num_iterations", "target_flops", "tokens_per_parameter")
        if getattr(pretrain, key) is not None
    }
    if len(horizons) != 1:
        given = ", ".join(f"pretrain.{key}={value:g}" for key, value in horizons.items()) or "none"
        extra = list(horizons)[1:]
        remedy = f" Add {' '.join(f'pretrain.{key}=null' for key in extra)}" if extra else ""
        yield (
            "exactly one of pretrain.num_iterations, pretrain.target_flops and pretrain.tokens_per_parameter must be "
            f"set; given: {given}.{remedy}"
        )
    if pretrain.target_bpb is not None:
        horizons["target_bpb"] = pretrain.target_bpb
    for key, value in horizons.items():
        if value <= 0:
            yield f"pretrain.{key} is {value:g}, expected more than 0"
    yield from _batch("pretrain", pretrain.batch, config.model.context_tokens)
    if pretrain.batch.tokens is None and config.optimizer.scaling is None:
        yield (
            "pretrain.batch.tokens is null, but optimizer.scaling, which would choose the batch, is null too. Give "
            "pretrain.batch.tokens, or choose optimizer=muon_jul2026"
        )
    yield from _schedule("pretrain", pretrain.schedule)


def _finetune(name: str, finetune: ConversationConfig, config: Config, steps: Pipeline) -> Iterator[str]:
    yield from _batch(name, finetune.batch, config.model.context_tokens)
    yield from _schedule(name, finetune.schedule)
    if finetune.teacher.path is not None and finetune.teacher.artifact is not None:
        yield f"{name}.teacher.path and {name}.teacher.artifact are both set: give one of them"
    yield from find_item_problems(f"{name}.mixture", finetune.mixture, training=True)
    if finetune.mixture_order is not None and sorted(finetune.mixture_order) != sorted(finetune.mixture):
        yield (
            f"{name}.mixture_order is [{', '.join(finetune.mixture_order)}], expected each task of {name}.mixture once "
            f"({', '.join(finetune.mixture)}), or null: shuffled"
        )
    yield from find_item_problems(f"{name}.validation", finetune.validation, training=False)
    if finetune.suite:
        yield from find_item_problems(f"{name}.suite", finetune.suite, training=False)
    if finetune.warm_start and finetune.adapter.is_there:
        yield (
            f"{name}.warm_start is true, but {name}.adapter.kind is {finetune.adapter.kind}: pretraining's moments "
            f"belong to other parameters. Give {name}.warm_start=false, or {name}.adapter.kind=none"
        )
    for step, wiring in steps.items():
        source = config.pipeline.get(wiring.get("checkpoint", ""), {})
        if not finetune.warm_start or wiring.get("stage") != name or source.get("stage") in (None, "outside"):
            continue
        keeps = getattr(getattr(config, source["stage"], None), "save_training_state", None)
        if keeps is None:
            yield (
                f"{name}.warm_start is true, but step {step} starts from {wiring['checkpoint']}, which keeps no "
                f"moments. Give {name}.warm_start=false, or pipeline.{step}.checkpoint=pretrain"
            )
        elif not keeps:
            yield f"{name}.warm_start is true, which needs {source['stage']}.save_training_state=true"


def _batch(name: str, batch: BatchConfig, context_tokens: int) -> Iterator[str]:
    if batch.row_tokens < 2 or (batch.tokens is not None and batch.tokens < 1):
        yield f"{name}.batch: tokens and row_tokens must be positive (row_tokens at least 2)"
    elif batch.tokens is not None and batch.tokens % batch.row_tokens:
        yield f"{name}.batch.tokens={batch.tokens} must be a multiple of {name}.batch.row_tokens={batch.row_tokens}"
    if batch.row_tokens > context_tokens:
        yield f"{name}.batch.row_tokens={batch.row_tokens} is longer than model.context_tokens={context_tokens}"


def _schedule(name: str, schedule: ScheduleConfig) -> Iterator[str]:
    if schedule.warmup_iterations is None and schedule.warmup_frac + schedule.warmdown_frac > 1:
        yield f"{name}.schedule: warmup_frac and warmdown_frac together are more than 1"


def _optimizer(optimizer: OptimizerConfig) -> Iterator[str]:
    if optimizer.variant == "jul2026" and optimizer.newton_schulz_iterations > _POLAR_EXPRESS_ITERATIONS:
        yield (
            f"optimizer.newton_schulz_iterations is {optimizer.newton_schulz_iterations}, expected at most "
            f"{_POLAR_EXPRESS_ITERATIONS}: variant jul2026 has no further coefficients"
        )
    if missing := [name for name in ADAMW_GROUPS if name not in optimizer.adamw_groups]:
        yield f"optimizer.adamw_groups has no {', '.join(missing)}: every parameter group needs an entry"
    for name in optimizer.adamw_groups:
        if name not in ADAMW_GROUPS:
            yield f'optimizer.adamw_groups: there is no parameter group "{name}".{suggest(name, ADAMW_GROUPS)}'


def _eval(config: Config) -> Iterator[str]:
    temperature, core = config.eval.temperature, config.eval.core
    if temperature == 0 and config.eval.seeds > 1:
        yield (
            f"eval.seeds is {config.eval.seeds} and eval.temperature is 0: greedy answers are all equal. "
            "Set eval.seeds=1, or another temperature (null: 1)"
        )
    if core is not None and core.tasks is not None and not core.tasks:
        yield "eval.core.tasks is empty, expected names of tasks, or null for all"
    if config.outside.path is None and any(step.get("stage") == "outside" for step in config.pipeline.values()):
        yield "outside.path is null, but the pipeline evaluates a third-party model: give outside.path=FOLDER"


def _imported(config: Config) -> Iterator[str]:
    imported = config.imported
    if not any(step.get("stage") == "imported" for step in config.pipeline.values()):
        return
    if (imported.repository is None) == (imported.folder is None):
        given = "both are" if imported.folder is not None else "neither is"
        yield f"exactly one of imported.repository and imported.folder must be set; {given}"
    if imported.repository is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+(/.+)?", imported.repository):
        yield (
            f'imported.repository is "{imported.repository}", expected <organisation>/<name>, such as '
            "karpathy/nanochat-d32"
        )
    if imported.step is not None and imported.step < 0:
        yield f"imported.step is {imported.step}, expected at least 0, or null for the last"


def _sweep(config: Config) -> Iterator[str]:
    sweep = config.sweep
    if sweep.name is not None and (Path(sweep.name).name != sweep.name or sweep.name.startswith(".")):
        yield f'sweep.name is "{sweep.name}", expected a folder name without a path'
    if sweep.metric is None and sweep.kind != "none":
        yield "sweep.metric has no value: give sweep.metric=STEP.METRIC, such as pretrain.val_bpb"


_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "above": ("more than", operator.gt), "at_least": ("at least", operator.ge),
    "below": ("below", operator.lt), "at_most": ("at most", operator.le),
}  # fmt: skip


def find_bound_problems(key: str, section: Any) -> Iterator[str]:
    """Yield a line for each value outside the bounds in its field's metadata.

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
            shown = f'"{value}"' if isinstance(value, str) else value
            last = "" if null else f" or {named.pop()}"
            hint = suggest(str(value), [str(each) for each in known])
            yield f"{where} is {shown}, expected {', '.join(named)}{last}{null}.{hint}"
        if not all(holds(value, bounds[name]) for name, (_, holds) in _BOUNDS.items() if name in bounds):
            expected = " and ".join(f"{words} {bounds[name]}" for name, (words, _) in _BOUNDS.items() if name in bounds)
            if {"at_least", "at_most"} <= bounds.keys():
                expected = f"{bounds['at_least']} to {bounds['at_most']}"
            yield f"{where} is {value}, expected {expected}{null}"


def find_unbounded(config: Config, found: Sequence[str]) -> Iterator[str]:
    """Yield a line for each number that is infinite or NaN, unless a line in `found` names it already."""
    keys = {key for line in found for key in re.findall(r"\w+(?:\.\w+)+", line.partition(": ")[0])}
    for key, value in flatten(plain_of(config)).items():
        if isinstance(value, float) and not math.isfinite(value) and key not in keys:
            yield f"{key} is {value}, expected a finite number"


def find_rl_problems(rl: RLConfig) -> Iterator[str]:
    """Yield a line for every impossible value, with what was expected."""
    yield from find_item_problems("rl", {"task": rl.task}, training=True)
    yield from find_item_problems("rl", {"evaluation": rl.evaluation}, training=False)
    if rl.temperature <= 0:
        yield f"rl.temperature is {rl.temperature}, expected more than 0: equal samples give no gradient"
    if rl.samples_per_question < 2:
        yield f"rl.samples_per_question is {rl.samples_per_question}, expected at least 2: their mean is the baseline"
    parts, questions = rl.minibatches_per_rollout, rl.questions_per_iteration
    if parts >= 1 and questions % parts:
        yield f"rl.questions_per_iteration={questions} must be a multiple of rl.minibatches_per_rollout={parts}"
    for name, reward in rl.rewards.items():
        yield from _reward(f"rl.rewards.{name}", reward)


def _preference(config: Config, steps: Pipeline) -> Iterator[str]:
    preference = config.preference
    yield from _schedule("preference", preference.schedule)
    if not any(step.get("stage") == "preference" for step in steps.values()):
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


def _reward(where: str, reward: RewardConfig) -> Iterator[str]:
    if reward.kind == "format":
        try:
            re.compile(reward.pattern or "")
        except re.error as error:
            yield f"{where}.pattern is not a regular expression: {error}"
        if not reward.pattern:
            yield f"{where}.pattern has no value, expected a regular expression"
    free, most = reward.free_tokens, reward.most_tokens
    if reward.kind == "length" and (free is None or most is None or not 0 <= free < most):
        yield f"{where}: free_tokens is {_shown(free)} and most_tokens {_shown(most)}, expected 0 <= free < most"
    if reward.kind == "function":
        try:
            load_part(reward.function or "")
        except ConfigError as error:
            yield f"{where}.function: {error}"


def _shown(value: int | None) -> str:
    return "null" if value is None else str(value)
