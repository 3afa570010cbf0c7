"""Sizes of models and adapters, as plain numbers without MLX, so that planning can use them.

The depth determines width, heads, parameters and FLOPs, as in nanochat's scripts/base_train.py and
`GPT.estimate_flops`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from mlxchat.config.schema import ArchitectureConfig, ModelConfig
from mlxchat.errors import DataError

# Input channels of the gates of value embeddings and of the smear.
VALUE_GATE_CHANNELS = 12
SMEAR_GATE_CHANNELS = 24
# October 2025 takes this as a target: depth 5 has 4 heads of 80. Other values of model.head_width must hold exactly.
NANOCHATS_HEAD_WIDTH = 128
# Short windows are multiples of the tile of nanochat's attention kernel.
_WINDOW_TILE = 128
_MOST_LAYERS, _MOST_CONTEXT_TOKENS, _MOST_SIZE, _MOST_FACTOR = 10_000, 1 << 24, 1 << 31, 1e12


@dataclass(frozen=True, kw_only=True)
class GPTSizes:
    """The architecture and sizes of a GPT. Features default to the architecture of October 2025."""

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    width: int
    context_tokens: int
    rope_theta: float
    architecture: str = "oct2025"
    """oct2025 or jul2026: determines the initial weights, and whether long windows are limited (jul2026)."""
    vocab_multiple: int = 1
    """Rows of embedding and head are padded to a multiple of this; logits are cropped to vocab_size."""
    window_pattern: str = "L"
    """S (short window) or L (whole context) for each layer, repeated; the last layer is always L."""
    short_window: int | None = None
    """Earlier tokens that a short window sees; None: a quarter of the context, in whole 128 tokens."""
    query_key_scale: float = 1.0
    """Factor of the normalised queries and keys."""
    value_embeddings: bool = False
    """Whether every second layer, counted from the last, adds a gated embedding to its values."""
    residual_scalars: bool = False
    """Whether each layer scales the stream and adds the first embedding to it, by learnt scalars."""
    smear: bool = False
    """Whether a gated share of the previous token's embedding is added to each token's."""
    backout: bool = False
    """Whether a learnt share of the middle layer's stream is subtracted before the head."""

    def __post_init__(self) -> None:
        """Check the values, which may come from foreign files and determine memory and time.

        Raises:
            DataError: values are impossible; names all of them.
        """
        most = {"num_layers": _MOST_LAYERS, "context_tokens": _MOST_CONTEXT_TOKENS}
        wrong = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "bool":
                fits = isinstance(value, bool)
            elif field.type.startswith("int"):
                fits = isinstance(value, int) and not isinstance(value, bool)
                fits = fits and 1 <= value <= most.get(field.name, _MOST_SIZE)
                fits = fits or (value is None and field.default is None)
            elif field.type == "float":
                fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _MOST_FACTOR
            else:
                fits = isinstance(value, str) and bool(value)
            if field.name == "window_pattern":
                fits = fits and not set(value) - {"S", "L"}
            wrong += [] if fits else [f"{field.name} is {str(value)[:40]}"]
        if wrong:
            raise DataError(f"impossible sizes of a model: {', '.join(wrong)}")

    @property
    def head_width(self) -> int:
        """Numbers per head."""
        return self.width // self.num_heads

    @property
    def kv_width(self) -> int:
        """Total width of all keys, or of all values."""
        return self.num_kv_heads * self.head_width

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the head."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def windows(self) -> list[int | None]:
        """Return for each layer the number of earlier tokens that a token attends to; None: all.

        In nanochat of July 2026 long windows have the length of the context, which limits them in longer inputs.
        October 2025 has no windows.
        """
        long = None if self.architecture == "oct2025" else self.context_tokens
        short = self.short_window or _short_window(self.context_tokens)
        kinds = [self.window_pattern[layer % len(self.window_pattern)] for layer in range(self.num_layers)]
        return [short if kind == "S" else long for kind in kinds[:-1]] + [long]

    def lengthened(self, context_tokens: int) -> GPTSizes:
        """Return the sizes with a longer context: long windows grow, short ones stay as the weights learnt them."""
        short = self.short_window or _short_window(self.context_tokens)
        kept = short if "S" in self.window_pattern and short != _short_window(context_tokens) else None
        return replace(self, context_tokens=context_tokens, short_window=kept)

    def has_value_embedding(self, layer: int) -> bool:
        """Return True if a layer has a value embedding."""
        return self.value_embeddings and layer % 2 == (self.num_layers - 1) % 2

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes as plain numbers."""
        return asdict(self)


def _short_window(context_tokens: int) -> int:
    return -(-context_tokens // 4 // _WINDOW_TILE) * _WINDOW_TILE


def count_heads(width: int, head_width: int) -> int:
    """Return the number of heads: ceil(width / head_width), as in nanochat, if the width per head is an even integer.

    Otherwise (width 320, heads of 128), where nanochat stops with an error, return the next larger number for which it
    is, provided that a head has at least half of head_width; without one, ceil(width / head_width).
    """
    least = max(1, math.ceil(width / head_width))
    fitting = (heads for heads in range(least, 2 * width // head_width + 1) if width % (2 * heads) == 0)
    return next(fitting, least) if head_width % 2 == 0 else least


def sizes_of(model: ModelConfig, architecture: ArchitectureConfig, vocab_size: int) -> GPTSizes:
    """Return the sizes of a checked configuration: width = depth × aspect_ratio, heads by `count_heads`."""
    width = model.depth * model.aspect_ratio
    if architecture.whole_heads:
        width = -(-width // model.head_width) * model.head_width
    num_heads = count_heads(width, model.head_width)
    of_others = ("name", "whole_heads", "dropout")
    return GPTSizes(
        vocab_size=vocab_size,
        num_layers=model.depth,
        num_heads=num_heads,
        num_kv_heads=model.num_kv_heads or num_heads,
        width=width,
        context_tokens=model.context_tokens,
        architecture=architecture.name,
        **{key: value for key, value in vars(architecture).items() if key not in of_others},
    )


def count_parameters(sizes: GPTSizes) -> dict[str, int]:
    """Return the number of parameters by kind, and their 'total'.

    'matrices' are all weights of the layers, including the gates of value embeddings; 'scalars' are the learnt scalars
    and the smear's gate (nanochat's `num_scaling_params`).
    """
    value_layers = sum(map(sizes.has_value_embedding, range(sizes.num_layers)))
    attention = 2 * sizes.width * sizes.width + 2 * sizes.width * sizes.kv_width
    matrices = sizes.num_layers * (attention + 8 * sizes.width * sizes.width)
    matrices += value_layers * VALUE_GATE_CHANNELS * sizes.num_kv_heads
    scalars = 2 * sizes.num_layers * sizes.residual_scalars
    scalars += (SMEAR_GATE_CHANNELS + 1) * sizes.smear + sizes.backout
    table = sizes.padded_vocab_size * sizes.width
    counts = {
        "embedding": table,
        "head": table,
        "value_embeddings": value_layers * sizes.padded_vocab_size * sizes.kv_width,
        "matrices": matrices,
        "scalars": scalars,
    }
    return {**counts, "total": sum(counts.values())}


def flops_per_token(sizes: GPTSizes) -> int:
    """Return training FLOPs per token, counted as in nanochat (PaLM, appendix B).

    6 for every weight that is multiplied with the stream, and 12 H D min(window, T) per layer for attention. The
    snapshot of October 2025 counts every weight except the embedding, with equal results.
    """
    counts = count_parameters(sizes)
    multiplied = counts["matrices"] + counts["head"] + SMEAR_GATE_CHANNELS * sizes.smear
    context = sizes.context_tokens
    seen = sum(context if window is None else min(window, context) for window in sizes.windows())
    return 6 * multiplied + 12 * sizes.num_heads * sizes.head_width * seen


# Adapters

TARGET_GROUPS = {
    "attention": ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj"),
    "mlp": ("mlp.c_fc", "mlp.c_proj"),
    "all": ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
}
"""Names of groups of matrices in every layer."""


@dataclass(frozen=True)
class AdapterSizes:
    """Kind, sizes and targets of adapters."""

    kind: str
    """lora or dora."""
    rank: int
    scale: float
    """Factor of the product of both matrices, as in mlx-lm: alpha / rank in the paper."""
    targets: tuple[str, ...]
    """Modules with adapters, such as transformer.h.0.attn.c_q."""
    bits: int | None = None
    """Bits of the quantised matrices of the base's layers; None: not quantised."""
    group_size: int = 64
    """Numbers of a row that share a scale, if the base is quantised."""
    dropout: float = 0.0
    """Dropout of the adapters' inputs during training."""


def matrices_of(sizes: GPTSizes) -> dict[str, tuple[int, int]]:
    """Return module name → shape (out, in) of every matrix that may have an adapter."""
    width, inner, kv = sizes.width, 4 * sizes.width, sizes.kv_width
    shapes = {
        "attn.c_q": (width, width),
        "attn.c_k": (kv, width),
        "attn.c_v": (kv, width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (inner, width),
        "mlp.c_proj": (width, inner),
    }
    layers = range(sizes.num_layers)
    return {f"transformer.h.{layer}.{name}": shape for layer in layers for name, shape in shapes.items()}


def count_adapter_parameters(adapters: AdapterSizes, sizes: GPTSizes) -> int:
    """Return the number of trained parameters of adapters on a model."""
    shapes = matrices_of(sizes)
    return sum(
        adapters.rank * sum(shapes[name]) + (shapes[name][0] if adapters.kind == "dora" else 0)
        for name in adapters.targets
    )


def resolve_targets(targets: Iterable[str], sizes: GPTSizes) -> tuple[str, ...]:
    """Return the modules of targets, in the model's order.

    Args:
        targets: names of TARGET_GROUPS, or suffixes of modules' names: c_q, mlp.c_proj, h.0.attn.c_q.
        sizes: of the model.

    Raises:
        KeyError: a target matches no module.
    """
    known, meant = matrices_of(sizes), set()
    for target in targets:
        ends = TARGET_GROUPS.get(target, (target,))
        found = {name for name in known for end in ends if f".{name}".endswith(f".{end}")}
        if not found:
            raise KeyError(target)
        meant |= found
    return tuple(name for name in known if name in meant)
