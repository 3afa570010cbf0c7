"""What is known of a stage before it runs: its metrics, its memory, and why it cannot run or extend a training."""

from collections.abc import Iterator
from pathlib import Path

from mlxchat.config.schema import Config, ConversationConfig, OptimizerConfig, PreferenceConfig, RLConfig, TeacherConfig
from mlxchat.model.sizes import GPTSizes, adapter_remedies, resolve_adapter, sizes_of
from mlxchat.ops.machine import DECODED_ROWS
from mlxchat.planning.horizon import derive_hyperparameters
from mlxchat.planning.inputs import sizes_of_folder
from mlxchat.planning.memory import Decoding, Training
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.stage import Metric
from mlxchat.store.bases import folder_of_weights
from mlxchat.store.fingerprint import changes, flatten
from mlxchat.store.manifest import CONTINUATION
from mlxchat.store.naming import resolve
from mlxchat.store.store import SAVED, Store
from mlxchat.tasks import chatcore_set, task_class

SUITE_ANSWER_TOKENS = 512  # of the suite during training, at most
# What weights, moments and the position in the data depend on.
_SAME_PRETRAINING = ("model", "architecture", "optimizer.kind", "optimizer.variant", "pretrain.packing")
_SAME_CONVERSATIONS = (
    "mixture", "mixture_order", "packing", "batch.row_tokens", "adapter",
)  # fmt: skip
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
        found: ConversationConfig = getattr(config, stage)
        return found

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
    stage: str,
    section: ConversationConfig,
    optimizer: OptimizerConfig,
    sizes: GPTSizes,
    rows: int,
    teacher: GPTSizes | None,
) -> Training:
    """Return what the memory of iterations of `rows` rows of conversations depends on."""
    adapters = resolve_adapter(f"{stage}.adapter", section.adapter, sizes)
    row_tokens = sizes.context_tokens + SUITE_ANSWER_TOKENS
    answers = any(task_class(item.task).kind == "generative" for item in section.suite.values())
    remedies = (f"no {stage}.teacher",) if teacher is not None else adapter_remedies(stage, adapters)
    return Training(
        sizes=sizes,
        optimizer=optimizer,
        rows=max(1, rows),
        row_tokens=section.batch.row_tokens,
        adapters=adapters,
        teacher=teacher,
        sampling=Decoding(sizes=sizes, row_tokens=row_tokens) if answers else None,
        remedies=(*remedies, f"a smaller {stage}.batch.row_tokens"),
    )


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
            yield (
                f"{stage}.teacher: {folder} holds no model; expected config.json, model*.safetensors and a tokenizer's "
                "files"
            )


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
        sizes=sizes,
        optimizer=optimizer,
        rows=rows,
        row_tokens=row_tokens,
        adapters=adapters,
        further_weights=int(config.kl_coefficient > 0),
        sampling=Decoding(sizes=sizes, row_tokens=row_tokens, bits=config.rollout_bits),
        sampled_rows=min(rows, DECODED_ROWS),
        remedies=(*adapter_remedies("rl", adapters), "a smaller rl.max_new_tokens"),
    )


def describe_pairs(config: PreferenceConfig, optimizer: OptimizerConfig, sizes: GPTSizes) -> Training:
    """Return what the memory of preference training depends on, whatever pairs are found."""
    adapters = resolve_adapter("preference.adapter", config.adapter, sizes)
    sampled_tokens = sizes.context_tokens + config.max_new_tokens
    is_sampled = not all(task_class(item.task).is_paired for item in (config.data, config.validation))
    return Training(
        sizes=sizes,
        optimizer=optimizer,
        rows=2 * config.pairs_per_iteration,
        row_tokens=config.row_tokens,
        adapters=adapters,
        sampling=Decoding(sizes=sizes, row_tokens=sampled_tokens) if is_sampled else None,
        remedies=(*adapter_remedies("preference", adapters), "a smaller preference.row_tokens"),
    )


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


def has_text(step: PlannedStep) -> bool:
    """Return True if the step evaluates a text of the user's."""
    return step.config.eval.text is not None


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
    Metric("text_bpb", "minimize", when=has_text, needs="eval.text"),
    Metric("text_perplexity", "minimize", when=has_text, needs="eval.text"),
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
