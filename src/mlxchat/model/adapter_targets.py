"""Which matrices of a model adapters sit on, in plain names, so that planning can ask without MLX."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mlxchat.model.sizing import GPTSizes

TARGET_GROUPS = {
    "attention": ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj"),
    "mlp": ("mlp.c_fc", "mlp.c_proj"),
    "all": ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
}
"""Names for several matrices of every layer."""


@dataclass(frozen=True)
class AdapterSizes:
    """Everything that fixes what adapters compute."""

    kind: str
    """lora or dora."""
    rank: int
    scale: float
    """Factor of the product of both matrices, as in mlx-lm: alpha / rank of the paper."""
    targets: tuple[str, ...]
    """Modules that have adapters, such as transformer.h.0.attn.c_q."""
    bits: int | None = None
    """Bits of the base's numbers in the matrices of the layers; None: they are as they were."""
    group_size: int = 64
    """Numbers of a row that share a scale, where the base is quantised."""


def matrices_of(sizes: GPTSizes) -> dict[str, tuple[int, int]]:
    """Return the shape (out, in) of every matrix that may have an adapter, by the name of its module."""
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
    """Return how many numbers of adapters on a model are trained."""
    shapes = matrices_of(sizes)
    return sum(
        adapters.rank * sum(shapes[name]) + (shapes[name][0] if adapters.kind == "dora" else 0)
        for name in adapters.targets
    )


def resolve_targets(targets: Iterable[str], sizes: GPTSizes) -> tuple[str, ...]:
    """Return the modules that targets mean, in the order of the model.

    Args:
        targets: names of TARGET_GROUPS, or ends of modules' names: c_q, mlp.c_proj, h.0.attn.c_q.
        sizes: of the model.

    Raises:
        KeyError: a target is the end of no module's name.
    """
    known, meant = matrices_of(sizes), set()
    for target in targets:
        ends = TARGET_GROUPS.get(target, (target,))
        found = {name for name in known for end in ends if f".{name}".endswith(f".{end}")}
        if not found:
            raise KeyError(target)
        meant |= found
    return tuple(name for name in known if name in meant)
