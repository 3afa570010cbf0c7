"""The schema of the model: its sizes and its architecture; `config.py` holds the rest. Values stand in conf/."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlxchat.missing import MISSING

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
