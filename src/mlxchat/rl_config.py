"""The schema of RL; `config.py` holds the rest. Values stand in conf/settings/rl.yaml, recipes in conf/rl/."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlxchat.adapter_config import NO_ADAPTER, AdapterConfig
from mlxchat.missing import MISSING
from mlxchat.optimizer_config import ScheduleConfig
from mlxchat.task_config import TaskItem


@dataclass(kw_only=True)
class RewardConfig:
    """One part of the reward; the reward is the sum of weight × value over the parts."""

    kind: str = MISSING
    """exact (the task's own: 1 for a right answer), format, length or function."""
    weight: float = 1.0
    """Factor of its value."""
    pattern: str | None = None
    """format: a regular expression, worth 1 where it is found in the answer, else 0; a dot matches line ends, too."""
    free_tokens: int | None = None
    """length: answers up to so many tokens are worth 0; beyond, the value falls evenly …"""
    most_tokens: int | None = None
    """length: … to −1 at so many."""
    function: str | None = field(default=None, metadata={"external": "function"})
    """function: module:function of yours, called with the conversation and the answer's text; returns a number. What
    stands in the module's file is part of the identity."""
    timeout_seconds: float | None = field(default=60.0, metadata={"identity": False})
    """function: seconds that one call may take; null: any."""
    failure_value: float | None = field(default=None, metadata={"since_default": None})
    """function: value of answers of which it raises, takes too long or returns no number; null: RL saves and ends."""


@dataclass(kw_only=True)
class RLConfig:
    """Policy gradient on sampled answers: nanochat's simplified GRPO, and the GRPO family."""

    task: TaskItem = MISSING
    """Problems to practise on; answers are rewarded by the task's verdict, or as `rewards` say."""
    evaluation: TaskItem = MISSING
    """Held-out problems for pass@k."""
    num_iterations: int | None = MISSING
    """Times that questions are asked; null: one pass over the task. Each gives minibatches_per_rollout ×
    passes_per_rollout updates, which the metrics count."""
    questions_per_iteration: int = MISSING
    samples_per_question: int = MISSING
    max_new_tokens: int = MISSING
    temperature: float = MISSING
    top_k: int | None = MISSING
    rewards: dict[str, RewardConfig] = field(default_factory=dict, metadata={"since_default": {}})
    """Parts of the reward, by names of your choice; none: the task's verdict alone."""
    advantages: str = field(default=MISSING, metadata={"since_default": "mean"})
    """mean: reward − mean of the question's; z_score: that over their standard deviation; leave_one_out: reward − mean
    of the question's others."""
    ratio: str = field(default=MISSING, metadata={"since_default": "token"})
    """token: each token's probability over that at sampling; sequence: their geometric mean over the answer (GSPO)."""
    clip_low: float | None = field(default=MISSING, metadata={"since_default": None})
    """A bad answer teaches no more where the ratio is below 1 − clip_low; null: no bound."""
    clip_high: float | None = field(default=MISSING, metadata={"since_default": None})
    """A good answer teaches no more where the ratio is above 1 + clip_high; null: no bound."""
    loss_divisor: str = field(default=MISSING, metadata={"since_default": "tokens"})
    """tokens: the loss is a mean over all sampled tokens; answers: over answers, of each answer's mean; longest: the
    sum over an answer's tokens / max_new_tokens, mean over answers."""
    kl_coefficient: float = field(default=MISSING, metadata={"since_default": 0.0})
    """Factor of the divergence (k3, of each token) from the model that RL began with, which is kept; 0: none."""
    minibatches_per_rollout: int = field(default=MISSING, metadata={"since_default": 1})
    """Parts into which the questions of an iteration are dealt, each of them an update."""
    passes_per_rollout: int = field(default=MISSING, metadata={"since_default": 1})
    """How often each of these parts is trained on."""
    resample_rounds: int = field(default=MISSING, metadata={"since_default": 0})
    """How often, at most, an iteration puts the next questions in the place of those whose answers are all rewarded
    alike, which teach nothing (DAPO's dynamic sampling); 0: never."""
    train_unfinished: bool = field(default=MISSING, metadata={"since_default": True})
    """Whether answers that max_new_tokens cut are trained on."""
    rollout_bits: int | None = field(default=MISSING, metadata={"since_default": None})
    """8 or 4: answers to practise on are sampled with weights rounded to so many bits, which the loss makes up for;
    null: with the model's own. Held-out problems are always answered with these."""
    rollout_correction: float = field(default=MISSING, metadata={"since_default": 2.0})
    """With rollout_bits a token counts as many times as it is likelier under the model itself than under the rounded
    one, at most so many times."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig, metadata={"since_default": NO_ADAPTER})
    """Small matrices that are trained in place of the model's, which then is the reference of kl_coefficient."""
    clip_gradients: bool = field(default=MISSING, metadata={"since_default": True})
    """Whether optimizer.grad_clip holds in this stage."""
    schedule: ScheduleConfig = MISSING
    """Learning rates over the updates; warmup_iterations counts these, too."""
    table_lr_frac: float = field(default=MISSING, metadata={"since_default": 1.0})
    """Further factor of the rates of all but the blocks' matrices: embeddings, head, scalars. AdamW steps as far for
    the faint gradients of tokens that have nothing to do with the reward, which loosens the policy."""
    eval_every: int | None = field(default=MISSING, metadata={"identity": False})
    """Iterations between evaluations; null: only before and after."""
    eval_samples: int = MISSING
    """Samples per held-out problem, for pass@1 … pass@eval_samples."""
    entropy_every: int | None = field(default=MISSING, metadata={"identity": False})
    """Iterations between measurements of the policy's entropy, a forward pass each; null: only where the log-
    probabilities are needed anyway (several updates, or a divergence), which is then each iteration."""
    rollouts_kept: int | None = field(default=MISSING, metadata={"identity": False})
    """Questions of each iteration whose answers are kept in rollouts.jsonl; null: all."""
