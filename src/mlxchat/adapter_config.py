"""The schema of adapters; `config.py` holds the rest. Values stand in conf/adapter/."""

from __future__ import annotations

from dataclasses import dataclass

from mlxchat.missing import MISSING


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
