"""The schema of RL. Values are in conf/settings/rl.yaml, recipes in conf/rl/."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlxchat.adapter_config import NO_ADAPTER, AdapterConfig
from mlxchat.missing import MISSING
from mlxchat.optimizer_config import ScheduleConfig
from mlxchat.task_config import TaskItem


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
class RLConfig:
    """Policy gradient on sampled completions: nanochat's simplified GRPO and the GRPO family."""

    task: TaskItem = MISSING
    """Questions to train on; the task rewards the answers, unless `rewards` is set."""
    evaluation: TaskItem = MISSING
    """Held-out questions for pass@k."""
    num_iterations: int | None = MISSING
    """Number of rollouts; null: one pass over the task. Each has minibatches_per_rollout × passes_per_rollout updates,
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
    entropy_every: int | None = field(default=MISSING, metadata={"identity": False})
    """Rollouts between measurements of the policy's entropy, one forward pass each; null: only where the loss needs
    log-probabilities anyway (several updates, a KL term or rollout_bits), and then in each rollout."""
    rollouts_kept: int | None = field(default=MISSING, metadata={"identity": False})
    """Questions of each rollout whose answers are kept in rollouts.jsonl; null: all."""
