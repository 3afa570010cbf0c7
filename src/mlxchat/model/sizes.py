"""Sizes of models and adapters, as plain numbers without MLX, so that planning can use them.

The depth determines width, heads, parameters and FLOPs, as in nanochat's scripts/base_train.py and
`GPT.estimate_flops`.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from mlxchat.config.schema import AdapterConfig, ArchitectureConfig, ModelConfig
from mlxchat.errors import ConfigError, suggest

# nanochat takes this as a target: depth 5 has 4 heads of 80. Other values of model.head_width must hold exactly.
NANOCHATS_HEAD_WIDTH = 128


@dataclass(frozen=True, kw_only=True)
class GPTSizes:
    """The architecture and sizes of a GPT; features are those of `ArchitectureConfig`, by default October 2025's."""

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    width: int
    context_tokens: int
    rope_theta: float
    architecture: str = "oct2025"  # or jul2026: determines initial weights, and whether long windows are limited
    vocab_multiple: int = 1
    window_pattern: str = "L"
    short_window: int | None = None
    """Earlier tokens that a short window sees; None: a quarter of the context, in whole 128 tokens."""
    query_key_scale: float = 1.0
    value_embeddings: bool = False
    residual_scalars: bool = False
    smear: bool = False
    backout: bool = False

    value_gate_channels: ClassVar[int] = 12  # input channels of the gates of value embeddings
    smear_gate_channels: ClassVar[int] = 24  # and of the smear's gate

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

    @cached_property
    def windows(self) -> list[int | None]:
        """For each layer the number of earlier tokens that a token attends to; None: all.

        In nanochat of July 2026 long windows have the context's length, which limits them in longer inputs.
        """
        long = None if self.architecture == "oct2025" else self.context_tokens
        short = self.short_window or -(-self.context_tokens // 4 // 128) * 128  # nanochat's kernel has tiles of 128
        kinds = [self.window_pattern[layer % len(self.window_pattern)] for layer in range(self.num_layers)]
        return [short if kind == "S" else long for kind in kinds[:-1]] + [long]

    @cached_property
    def value_embedding_layers(self) -> list[int]:
        """The layers with a value embedding: every second one, the last included."""
        return list(range((self.num_layers - 1) % 2, self.num_layers, 2)) if self.value_embeddings else []

    def for_model_file(self) -> dict[str, Any]:
        """Return every number that gpt.py reads, also those that follow from others, for mlx-lm."""
        derived = "head_width kv_width padded_vocab_size windows value_embedding_layers"
        constants = "value_gate_channels smear_gate_channels"
        return {**asdict(self), **{name: getattr(self, name) for name in f"{derived} {constants}".split()}}


def count_heads(width: int, head_width: int) -> int:
    """Return the number of heads: ceil(width / head_width), as in nanochat, if the width per head is an even integer.

    Otherwise (width 320, heads of 128), where nanochat stops with an error, return the next larger number for which it
    is, provided that a head has at least half of head_width; without one, ceil(width / head_width).
    """
    least = math.ceil(width / head_width)
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
        vocab_size=vocab_size, num_layers=model.depth, num_heads=num_heads,
        num_kv_heads=model.num_kv_heads or num_heads, width=width, context_tokens=model.context_tokens,
        architecture=architecture.name,
        **{key: value for key, value in vars(architecture).items() if key not in of_others},
    )  # fmt: skip


def count_parameters(sizes: GPTSizes) -> dict[str, int]:
    """Return the number of parameters by kind, and their 'total'.

    'matrices' are all weights of the layers, including the gates of value embeddings; 'scalars' are the learnt scalars
    and the smear's gate (nanochat's `num_scaling_params`).
    """
    width, value_layers = sizes.width, len(sizes.value_embedding_layers)
    layer = 2 * width * width + 2 * width * sizes.kv_width + 8 * width * width
    gates = value_layers * sizes.value_gate_channels * sizes.num_kv_heads
    scalars = 2 * sizes.num_layers * sizes.residual_scalars
    scalars += (sizes.smear_gate_channels + 1) * sizes.smear + sizes.backout
    counts = {
        "embedding": sizes.padded_vocab_size * width,
        "head": sizes.padded_vocab_size * width,
        "value_embeddings": value_layers * sizes.padded_vocab_size * sizes.kv_width,
        "matrices": sizes.num_layers * layer + gates,
        "scalars": scalars,
    }
    return {**counts, "total": sum(counts.values())}


def flops_per_token(sizes: GPTSizes) -> int:
    """Return training FLOPs per token, counted as in nanochat (PaLM, appendix B).

    6 for every weight that is multiplied with the stream, and 12 H D min(window, T) per layer for attention. The
    snapshot of October 2025 counts every weight except the embedding, with equal results.
    """
    counts = count_parameters(sizes)
    multiplied = counts["matrices"] + counts["head"] + sizes.smear_gate_channels * sizes.smear
    context = sizes.context_tokens
    seen = sum(context if window is None else min(window, context) for window in sizes.windows)
    return 6 * multiplied + 12 * sizes.num_heads * sizes.head_width * seen


# Adapters

_ATTENTION = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj")
_MLP = ("mlp.c_fc", "mlp.c_proj")
TARGET_GROUPS = {"attention": _ATTENTION, "mlp": _MLP, "all": _ATTENTION + _MLP}  # of matrices in every layer
PARAMETERS = {"lora": ("lora_a", "lora_b"), "dora": ("lora_a", "lora_b", "m")}  # of an adapter, by kind


def matrices_of(sizes: GPTSizes) -> dict[str, tuple[int, int]]:
    """Return module name → shape (out, in) of every matrix that may have an adapter."""
    width = sizes.width
    shapes = dict.fromkeys(TARGET_GROUPS["attention"], (width, width))
    shapes |= dict.fromkeys(("attn.c_k", "attn.c_v"), (sizes.kv_width, width))
    shapes |= {"mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}
    layers = range(sizes.num_layers)
    return {f"transformer.h.{layer}.{name}": shape for layer in layers for name, shape in shapes.items()}


def shapes_of(adapters: AdapterConfig, sizes: GPTSizes) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of adapters on a model."""
    rank, matrices = adapters.rank, matrices_of(sizes)
    return {
        f"{module}.{name}": shape
        for module in adapters.targets
        for rows, columns in [matrices[module]]
        for name, shape in zip(PARAMETERS[adapters.kind], ((columns, rank), (rank, rows), (rows,)), strict=False)
    }


def resolve_targets(targets: Iterable[str], sizes: GPTSizes) -> list[str]:
    """Return the modules that targets name, such as transformer.h.0.attn.c_q, in the model's order.

    A target is a name of TARGET_GROUPS or a suffix of modules' names: c_q, mlp.c_proj, h.0.attn.c_q.
    """
    ends = tuple(f".{end}" for target in targets for end in TARGET_GROUPS.get(target, (target,)))
    return [name for name in matrices_of(sizes) if f".{name}".endswith(ends)]


def resolve_adapter(where: str, adapter: AdapterConfig, sizes: GPTSizes) -> AdapterConfig | None:
    """Return the adapter of a section, such as sft.adapter, with modules' names as targets, or None if it has none."""
    if not adapter.is_there:
        return None
    problems = []
    for target in adapter.targets:
        if not resolve_targets([target], sizes):
            known = [*TARGET_GROUPS, *dict.fromkeys(name.rpartition(".")[2] for name in matrices_of(sizes))]
            problems.append(
                f'{where}.targets: the model has no matrix "{target}": expected attention, mlp, all, or c_q, c_k, c_v, '
                f"c_proj, c_fc, optionally with their prefixes (mlp.c_proj, h.0.attn.c_q).{suggest(target, known)}"
            )
    if not adapter.targets:
        problems.append(f"{where}.targets is empty, expected attention, mlp, all, or matrices such as c_q")
    if adapter.bits is not None and sizes.width % max(1, adapter.group_size):
        problems.append(
            f"{where}.group_size is {adapter.group_size}, which does not divide the model's width of {sizes.width}: "
            f"expected 32, 64 or 128, or {where}.bits=null"
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return replace(adapter, targets=resolve_targets(adapter.targets, sizes))


def adapter_remedies(stage: str, adapter: AdapterConfig | None) -> tuple[str, ...]:
    """Return settings of a stage's adapters that lower its memory."""
    if adapter is None:
        return (f"{stage}.adapter.kind=lora",)
    return (f"{stage}.adapter.bits=4",) if adapter.bits is None else ()
