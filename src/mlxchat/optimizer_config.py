"""The schema of optimizers and schedules; `config.py` holds the rest. Values stand in conf/."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlxchat.missing import MISSING

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
