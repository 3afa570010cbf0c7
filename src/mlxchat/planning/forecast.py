"""What is known of a stage before it runs: metrics, memory, duration, and why it cannot run or extend a training."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mlxchat.config.schema import Config, ConversationConfig, OptimizerConfig, PreferenceConfig, RLConfig, TeacherConfig
from mlxchat.model.sizes import GPTSizes, adapter_remedies, flops_per_token, resolve_adapter, sizes_of
from mlxchat.ops.machine import DECODED_ROWS, device_kind
from mlxchat.planning.horizon import derive_hyperparameters
from mlxchat.planning.inputs import sizes_of_folder
from mlxchat.planning.memory import Decoding, Training
from mlxchat.runner.plan import Estimate, PlannedStep, nearest_of
from mlxchat.runner.stage import Metric
from mlxchat.store.catalog import folder_of_weights
from mlxchat.store.fingerprint import changes, flatten
from mlxchat.store.manifest import CONTINUATION
from mlxchat.store.naming import resolve
from mlxchat.store.store import SAVED, Store
from mlxchat.tasks import chatcore_set, task_class

if TYPE_CHECKING:
    import mlx.core as mx


SUITE_ANSWER_TOKENS = 512  # of the suite during training, at most
# What weights, moments and the position in the data depend on.
_SAME_PRETRAINING = ("model", "architecture", "optimizer.kind", "optimizer.variant", "pretrain.packing")
_SAME_CONVERSATIONS = ("mixture", "mixture_order", "packing", "batch.row_tokens", "adapter")
LOOP_METRICS = (
    Metric(
        "skipped_iterations",
        "minimize",
        when=lambda step: step.config.training.on_nan == "skip",
        needs="training.on_nan=skip",
    ),
    Metric("tokens_per_second", "maximize"),
    Metric("data_wait_frac", "minimize"),
)
"""Metrics of every training."""


def conversation_metrics(stage: str) -> tuple[Metric, ...]:
    """Return the metrics of midtrain or sft."""

    def section(config: Config) -> ConversationConfig:
        return cast(ConversationConfig, getattr(config, stage))

    def has_teacher(step: PlannedStep) -> bool:
        return section(step.config).teacher.is_there

    def has_suite(step: PlannedStep) -> bool:
        return bool(section(step.config).suite)

    return (
        Metric("val_loss", "minimize", curve=True),
        Metric("loss", "minimize", curve=True),
        Metric("ce", "minimize", when=has_teacher, needs=f"{stage}.teacher"),
        Metric("kl", "minimize", when=has_teacher, needs=f"{stage}.teacher"),
        Metric("accuracy_*", "maximize", names=lambda config: section(config).suite),
        Metric("mean_centered", "maximize", when=has_suite, needs=f"{stage}.suite"),
        Metric("mean_centered_choice", "maximize", when=has_suite, needs=f"{stage}.suite"),
        Metric("truncated_conversations", "minimize"),
        *LOOP_METRICS,
    )


def memory(config: Config, stage: str, sizes: GPTSizes) -> Training:
    """Return what the memory of a stage depends on; a batch is as large as pretraining's where none is given."""
    if stage == "pretrain":
        return _pretraining(config, sizes)
    section: ConversationConfig = getattr(config, stage)
    tokens = section.batch.tokens or derive_hyperparameters(config, sizes).batch_tokens
    given = section.teacher
    teacher = sizes_of_folder(teacher_folder(given, Path(config.outputs))) if given.is_there else None
    return describe(stage, section, config.optimizer, sizes, tokens // section.batch.row_tokens, teacher)


def _pretraining(config: Config, sizes: GPTSizes) -> Training:
    section, row_tokens = config.pretrain, config.pretrain.batch.row_tokens
    # A token has at least a byte; one more begins the text.
    prompts = [min(sizes.context_tokens, 1 + len(prompt.encode())) for prompt in section.prompts]
    return Training(
        sizes=sizes,
        optimizer=config.optimizer,
        row_tokens=row_tokens,
        rows=max(1, derive_hyperparameters(config, sizes).batch_tokens // row_tokens),
        sampling=Decoding(sizes=sizes, row_tokens=max(prompts) + section.sample_tokens) if prompts else None,
        sampled_rows=min(len(prompts), DECODED_ROWS),
        remedies=("a smaller model.depth", "a smaller pretrain.batch.row_tokens"),
    )


def describe(
    stage: str, section: ConversationConfig, optimizer: OptimizerConfig, sizes: GPTSizes, rows: int,
    teacher: GPTSizes | None,
) -> Training:  # fmt: skip
    """Return what the memory of iterations of `rows` rows of conversations depends on."""
    adapters = resolve_adapter(f"{stage}.adapter", section.adapter, sizes)
    row_tokens = sizes.context_tokens + SUITE_ANSWER_TOKENS
    answers = any(task_class(item.task).kind == "generative" for item in section.suite.values())
    remedies = (f"no {stage}.teacher",) if teacher is not None else adapter_remedies(stage, adapters)
    return Training(
        sizes=sizes, optimizer=optimizer, rows=max(1, rows), row_tokens=section.batch.row_tokens, adapters=adapters,
        teacher=teacher, sampling=Decoding(sizes=sizes, row_tokens=row_tokens) if answers else None,
        remedies=(*remedies, f"a smaller {stage}.batch.row_tokens"),
    )  # fmt: skip


def problems(config: Config, step: PlannedStep, plan: list[PlannedStep], sizes: GPTSizes | None) -> Iterator[str]:
    """Yield why a step cannot extend its training, have rows of this length, or learn from its teacher."""
    stage = step.stage.name
    if stage == "pretrain":
        yield from find_extension_problems(step, plan, _SAME_PRETRAINING)
        return
    section: ConversationConfig = getattr(config, stage)
    same = ("seed", "optimizer.kind", "optimizer.variant", *(f"{stage}.{name}" for name in _SAME_CONVERSATIONS))
    yield from find_extension_problems(step, plan, same)
    sizes = sizes or sizes_of(config.model, config.architecture, config.tokenizer.vocab_size)
    if (rows := section.batch.row_tokens) > sizes.context_tokens:
        yield (
            f"{stage}.batch.row_tokens={rows} is longer than the context of the model that {step.name} starts from. "
            f"Set {stage}.batch.row_tokens={sizes.context_tokens}"
        )
    if section.teacher.is_there:
        folder = teacher_folder(section.teacher, Path(config.outputs))
        if not (folder / "config.json").is_file() or not any(folder_of_weights(folder).glob("model*.safetensors")):
            files = "config.json, model*.safetensors and a tokenizer's files"
            yield f"{stage}.teacher: {folder} holds no model; expected {files}"


def find_extension_problems(step: PlannedStep, plan: list[PlannedStep], same: tuple[str, ...]) -> Iterator[str]:
    """Yield why a step cannot extend the training that it names; nothing if it names none.

    `same` names the sections and settings that weights, moments or the position in the data depend on.
    """
    extended = step.artifacts.get("extends")
    if extended is None:
        return
    stage, name = step.stage.name, extended["name"]
    where = f"{stage}.extend={getattr(step.config, stage).extend}:"
    if extended["stage"] != stage:
        yield f"{where} {name} is made by stage {extended['stage']}; only stage {stage}'s own can be extended"
        return
    if not {file["path"] for file in extended["outputs"]}.issuperset(CONTINUATION):
        yield (
            f"{where} {name} has no training state. Train it again with its settings and "
            f"{stage}.save_training_state=true 'force=[{extended['step'].partition(SAVED)[0]}]'"
        )
    wanted, done = getattr(step.config, stage).num_iterations, extended["derived"]["num_iterations"]
    if wanted is not None and wanted <= done:
        yield f"{where} {name} already has {done} iterations: give {stage}.num_iterations more than {done}"
    before, now = (
        flatten(identity) | {pin.partition(" ")[2]: digest for pin, digest in pins.items()}
        for identity, pins in ((extended["config"], extended["pins"]), (step.identity, step.externals))
    )
    for key, (old, new) in sorted(changes(before, now, "default").items()):
        if any(f"{key}.".startswith(f"{each}.") for each in same) and key != "architecture.dropout":
            yield f"{where} {key} is {new}, but {name} was made with {old}"
    inputs = step.inputs_made(Store(Path(step.config.outputs)), {each.name: each for each in plan})
    for role in step.stage.inputs:
        made = extended["inputs"].get(role, {})
        if role not in inputs or made.get("tree") != inputs[role]["tree"]:
            yield f"{where} its {role} is another one, {name} was made with {made.get('artifact')}"


def teacher_folder(teacher: TeacherConfig, outputs: Path) -> Path:
    """Return the folder of a teacher; a StoreError: no artifact, or several, have its name."""
    return Path(teacher.path or "") if teacher.artifact is None else resolve(Store(outputs), teacher.artifact)


# What weights, moments or the position in the data depend on; where the model answers questions, its answers too.
_ROLLOUT = ("questions_per_iteration", "minibatches_per_rollout", "passes_per_rollout", "resample_rounds")
_SAME_RL = ("task", "adapter", *_ROLLOUT)
_SAME_PAIRS = ("data", "adapter", "pairs_per_iteration", "row_tokens")
_SAME_SAMPLES = ("samples_per_question", "pairs_per_question", "max_new_tokens", "temperature", "top_k")


def rl_memory(config: Config, stage: str, sizes: GPTSizes) -> Training:
    """Return what the memory of a stage depends on; RL measures its longest prompt, of which tasks may have a bound."""
    if stage == "preference":
        return describe_pairs(config.preference, config.optimizer, sizes)
    row_tokens = sizes.context_tokens
    limits = [task_class(item.task).prompt_tokens for item in (config.rl.task, config.rl.evaluation)]
    known = [limit for limit in limits if limit is not None]
    if len(known) == len(limits):  # a token is a byte or more
        row_tokens = max(known) + config.rl.max_new_tokens
    return describe_rl(config.rl, config.optimizer, sizes, row_tokens)


def rl_problems(config: Config, step: PlannedStep, plan: list[PlannedStep], sizes: GPTSizes | None) -> Iterator[str]:
    """Yield why a step cannot train on rows of this length, or extend the finished training that it names."""
    same: tuple[str, ...] = _SAME_RL
    if step.stage.name != "rl":
        is_sampled = not task_class(config.preference.data.task).is_paired
        same = _SAME_PAIRS + (_SAME_SAMPLES if is_sampled else ())
        rows = config.preference.row_tokens
        if sizes is not None and rows > sizes.context_tokens:
            yield (
                f"preference.row_tokens={rows} is longer than the context of the model that {step.name} starts from: "
                f"{sizes.context_tokens}. Give preference.row_tokens={sizes.context_tokens}"
            )
    settings = (f"{step.stage.name}.{name}" for name in same)
    yield from find_extension_problems(step, plan, ("seed", "optimizer.kind", "optimizer.variant", *settings))


def describe_rl(config: RLConfig, optimizer: OptimizerConfig, sizes: GPTSizes, row_tokens: int) -> Training:
    """Return what the memory of RL depends on, with rows of at most `row_tokens` tokens."""
    adapters = resolve_adapter("rl.adapter", config.adapter, sizes)
    rows = config.questions_per_iteration * config.samples_per_question
    return Training(
        sizes=sizes, optimizer=optimizer, rows=rows, row_tokens=row_tokens, adapters=adapters,
        further_weights=int(config.kl_coefficient > 0),
        sampling=Decoding(sizes=sizes, row_tokens=row_tokens, bits=config.rollout_bits),
        sampled_rows=min(rows, DECODED_ROWS),
        remedies=(*adapter_remedies("rl", adapters), "a smaller rl.max_new_tokens"),
    )  # fmt: skip


def describe_pairs(config: PreferenceConfig, optimizer: OptimizerConfig, sizes: GPTSizes) -> Training:
    """Return what the memory of preference training depends on, whatever pairs are found."""
    adapters = resolve_adapter("preference.adapter", config.adapter, sizes)
    sampled_tokens = sizes.context_tokens + config.max_new_tokens
    is_sampled = not all(task_class(item.task).is_paired for item in (config.data, config.validation))
    return Training(
        sizes=sizes, optimizer=optimizer, rows=2 * config.pairs_per_iteration, row_tokens=config.row_tokens,
        adapters=adapters, sampling=Decoding(sizes=sizes, row_tokens=sampled_tokens) if is_sampled else None,
        remedies=(*adapter_remedies("preference", adapters), "a smaller preference.row_tokens"),
    )  # fmt: skip


def eval_memory(config: Config, stage: str, sizes: GPTSizes) -> Decoding:
    """Return the decoding whose memory to predict; prompts are cropped to the context."""
    return Decoding(
        sizes=sizes,
        row_tokens=sizes.context_tokens + config.eval.max_new_tokens,
        remedies=("a smaller eval.max_new_tokens",),
    )


def has_corpus(step: PlannedStep) -> bool:
    """Return True if the step evaluates held-out text of a corpus."""
    return "corpus" in step.inputs


def has_core(step: PlannedStep) -> bool:
    """Return True if the step measures the whole of CORE."""
    core = step.config.eval.core
    return step.format != "chat" and core is not None and not core.tasks


def has_suite(step: PlannedStep) -> bool:
    """Return True if the step measures tasks of the suite."""
    return step.format != "base" and bool(step.config.suite)


def has_chatcore(step: PlannedStep) -> bool:
    """Return True if the suite has all tasks of ChatCORE."""
    tasks = {item.task for item in step.config.suite.values() if item.split == "test"}
    return has_suite(step) and chatcore_set(tasks) is not None


TEXT_METRICS = (
    Metric("val_bpb", "minimize", when=has_corpus, needs="pipeline.STEP.corpus"),
    Metric("perplexity", "minimize", when=has_corpus, needs="pipeline.STEP.corpus"),
    Metric("text_bpb", "minimize", when=lambda step: step.config.eval.text is not None, needs="eval.text"),
    Metric("text_perplexity", "minimize", when=lambda step: step.config.eval.text is not None, needs="eval.text"),
)
TASK_METRICS = (
    Metric("*", "maximize", names=lambda config: config.suite, when=has_suite, needs="a chat model and the suite"),
    Metric(
        "*",
        "maximize",
        names=lambda config: config.eval.base_tasks,
        when=lambda step: step.format != "chat",
        needs="a base model and eval.base_tasks",
    ),
    Metric("mean_centered", "maximize", when=has_suite, needs="a chat model and a suite"),
    Metric("chatcore", "maximize", when=has_chatcore, needs="a chat model and suite=chatcore"),
)


# Reached by trainings of this project on CPUs; on GPUs an assumption.
_SHARE_OF_PEAK = 0.4
# A day of the slowest machine that is likely: 12 GFLOP/s.
_LONG_FLOPS = 1e15


def estimate_steps(plan: Iterable[PlannedStep], store: Store) -> dict[str, Estimate | None]:
    """Return step → estimate for unfinished steps: of a pretraining its prediction, else a similar artifact's; or None.

    Similar is the artifact of the same stage and label (a model's size, a corpus) with the fewest other differences in
    its config: a small model's duration says nothing about a large one's.
    """
    found: dict[str, Estimate | None] = {}
    for step in plan:
        if step.done:
            continue
        made = (made for made in store.recent(step.stage.name) if made["name"].rpartition("-")[0] == step.title)
        found[step.name] = _predict(step, store) if step.stage.name == "pretrain" else None
        if found[step.name] is None and (near := nearest_of(step.identity, made)) is not None:
            size = sum(file["bytes"] for file in near["outputs"])
            found[step.name] = Estimate(seconds=near["seconds"], bytes=size, artifact=near["name"])
    return found


def _predict(step: PlannedStep, store: Store) -> Estimate | None:
    """Return the estimate of a pretraining with a known speed; the bytes are those of weights and moments.

    The speed is that of the finished pretraining with the nearest FLOPs per token on the same kind of device, else
    `machine.training_flops`, else, for a training that may take a day, a share of this device's peak.
    """
    config = step.config
    sizes = sizes_of(config.model, config.architecture, config.tokenizer.vocab_size)
    derived, per_token = derive_hyperparameters(config, sizes), flops_per_token(sizes)
    flops = per_token * derived.batch_tokens * derived.num_iterations
    kind = device_kind(config.machine.device)
    made = [each for each in store.recent("pretrain") if _speed(each) and each["device"]["backend"] == kind]
    speed, source = config.machine.training_flops, "machine.training_flops"
    if made:
        nearest = min(made, key=lambda each: abs(math.log(each["derived"]["flops_per_token"] / per_token)))
        speed, source = _speed(nearest), nearest["name"]
    elif speed is None and flops > _LONG_FLOPS and config.pretrain.max_seconds is None:
        from mlxchat.ops.device import select_device  # imports MLX

        dtype = select_device(config.machine.device, config.machine.compute_dtype)
        speed, source = _SHARE_OF_PEAK * (peak_flops(dtype) or measure_flops(dtype)), "this device's peak"
    seconds, most = flops / speed if speed is not None else math.inf, config.pretrain.max_seconds
    if most is not None and most <= seconds:
        seconds, source = most, "pretrain.max_seconds"
    if seconds == math.inf:
        return None
    held = Training(sizes=sizes, optimizer=config.optimizer, rows=1, row_tokens=1).held_bytes
    return Estimate(seconds=seconds, bytes=held, artifact=source)


def _speed(made: Mapping[str, Any]) -> float:
    per_token: float = made.get("derived", {}).get("flops_per_token", 0)
    return per_token * (made.get("tokens_per_second") or 0)


# Dense TFLOP/s of (bfloat16, float32) by words of the device's name, the more specific first.
# NVIDIA: the white papers and data sheets, without sparsity; float32 is TF32, MLX's default there. Apple: M1 from its
# announcements, M2 as cores × 128 ALUs × 2 × 1.398 GHz, half precision at the rate of float32.
_PEAKS = {
    "h200 nvl": (836.0, 418.0), "h200": (989.4, 494.7), "h100 nvl": (835.0, 417.5), "h100 pcie": (756.0, 378.0),
    "h100": (989.4, 494.7), "a100": (312.0, 156.0), "l40s": (362.0, 183.0), "l4": (121.0, 60.0),
    "rtx 4090": (165.2, 82.6), "rtx 5090": (209.5, 104.8), "m1 ultra": (21.0, 21.0), "m1 max": (10.4, 10.4),
    "m1 pro": (5.2, 5.2), "m1": (2.6, 2.6), "m2 ultra": (27.2, 27.2), "m2 max": (13.6, 13.6), "m2 pro": (6.8, 6.8),
    "m2": (3.6, 3.6),
}  # fmt: skip


def peak_flops(dtype: mx.Dtype, device_name: str | None = None) -> float | None:
    """Return the published dense peak in FLOP/s of a GPU by its name (None: the default device); None: not known."""
    import mlx.core as mx

    from mlxchat.ops.device import backend

    if device_name is None:
        device_name = "" if backend() == "cpu" else str(mx.device_info().get("device_name", ""))
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    for name, (half, single) in _PEAKS.items():
        if words.issuperset(name.split()) and dtype in (mx.bfloat16, mx.float32):
            return 1e12 * (half if dtype == mx.bfloat16 else single)
    return None


def measure_flops(dtype: mx.Dtype, size: int = 1024) -> float:
    """Return the FLOP/s of the fastest of some products of matrices (size, size)."""
    import mlx.core as mx

    matrix, seconds = mx.ones((size, size), dtype=dtype), []
    for _ in range(8):
        began = time.perf_counter()
        mx.eval(matrix @ matrix)
        seconds.append(time.perf_counter() - began)
    return 2.0 * size**3 / min(seconds)
