"""Impossible values of adapters; see `composition/problems.py` for all others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlxchat.config.schema import NO_ADAPTER, AdapterConfig
from mlxchat.errors import ConfigError, suggest
from mlxchat.model.sizes import TARGET_GROUPS, AdapterSizes, GPTSizes, matrices_of, resolve_targets

_KINDS = ("none", "lora", "dora")
_BITS = (4, 8)
_GROUP_SIZES = (32, 64, 128)  # supported by MLX


def find_adapter_problems(where: str, adapter: AdapterConfig, sizes: GPTSizes | None) -> Iterator[str]:
    """Yield a message for each impossible value.

    Args:
        where: the section's key, such as sft.adapter.
        adapter: the section.
        sizes: of the model; None: not known yet, `adapter_sizes_of` checks them later.
    """
    if adapter.kind not in _KINDS:
        yield f'{where}.kind is "{adapter.kind}", expected {", ".join(_KINDS)}.{suggest(adapter.kind, _KINDS)}'
    if not adapter.is_there:
        return
    if not adapter.scale > 0:
        yield f"{where}.scale is {adapter.scale:g}, expected more than 0"
    if not 0 <= adapter.dropout < 1:
        yield f"{where}.dropout is {adapter.dropout:g}, expected at least 0 (off) and below 1"
    if not adapter.learning_rate > 0:
        yield f"{where}.learning_rate is {adapter.learning_rate:g}, expected more than 0"
    if not adapter.weight_decay >= 0:
        yield f"{where}.weight_decay is {adapter.weight_decay:g}, expected at least 0"
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(adapter, key) < 1:
            yield f"{where}.{key} is {getattr(adapter, key):g}, expected at least 0 and below 1"
    if adapter.bits is not None and adapter.bits not in _BITS:
        yield f"{where}.bits is {adapter.bits}, expected 4 or 8, or null for a base that is not quantised"
    if adapter.group_size not in _GROUP_SIZES:
        yield f"{where}.group_size is {adapter.group_size}, expected 32, 64 or 128"
    if adapter.rank < 1:
        yield f"{where}.rank is {adapter.rank}, expected at least 1"
    if not adapter.targets:
        yield f"{where}.targets is empty, expected attention, mlp, all, or matrices such as c_q"
    elif sizes is not None:
        yield from _problems_with_model(where, adapter, sizes)


def find_unread_problems(adapter: AdapterConfig, others: list[AdapterConfig]) -> Iterator[str]:
    """Yield a message if the group's values are set, but no stage has adapters."""
    if adapter.is_there or any(other.is_there for other in others):
        return
    given = [name for name in vars(NO_ADAPTER) if getattr(adapter, name) != getattr(NO_ADAPTER, name)]
    if given:
        keys = ", ".join(f"adapter.{name}" for name in given)
        yield f"{keys}: set, but there is no adapter. Choose adapter=lora, adapter=dora or adapter=qlora"


def find_fusing_problems(
    pipeline: Mapping[str, Mapping[str, Any]], stages: Mapping[str, AdapterConfig]
) -> Iterator[str]:
    """Yield a message for each step that fuses a model without adapters."""
    for name, step in pipeline.items():
        source = step.get("checkpoint", "")
        stage, own = pipeline.get(source, {}).get("stage"), pipeline.get(source, {}).get("with")
        if step.get("stage") != "fused" or stage not in ("pretrain", *stages) or own:
            continue
        if stage == "pretrain" or not stages[stage].is_there:
            remedy = "" if stage == "pretrain" else f", or set {stage}.adapter.kind=lora"
            yield f"pipeline.{name}: {source} trains all weights, so it has no adapters to fuse. Remove it{remedy}"


def adapter_remedies(stage: str, sizes: AdapterSizes | None) -> tuple[str, ...]:
    """Return settings of a stage's adapters that lower its memory."""
    if sizes is None:
        return (f"{stage}.adapter.kind=lora",)
    return (f"{stage}.adapter.bits=4",) if sizes.bits is None else ()


def adapter_sizes_of(where: str, adapter: AdapterConfig, sizes: GPTSizes) -> AdapterSizes | None:
    """Return the sizes of a model's adapters; None: it has none.

    Raises:
        ConfigError: they do not fit the model.
    """
    if not adapter.is_there:
        return None
    if problems := list(find_adapter_problems(where, adapter, sizes)):
        raise ConfigError("\n".join(problems))
    targets = resolve_targets(adapter.targets, sizes)
    return AdapterSizes(
        adapter.kind, adapter.rank, adapter.scale, targets, adapter.bits, adapter.group_size, adapter.dropout
    )


def _problems_with_model(where: str, adapter: AdapterConfig, sizes: GPTSizes) -> Iterator[str]:
    shapes = matrices_of(sizes)
    # All ends of modules' names that consist of whole parts.
    ends = {".".join(name.split(".")[start:]) for name in shapes for start in range(1, 5)}
    meant: set[str] = set()
    for target in adapter.targets:
        try:
            meant |= set(resolve_targets([target], sizes))
        except KeyError:
            known = [*TARGET_GROUPS, *sorted(ends, key=lambda end: (end.count("."), end))]
            yield (
                f'{where}.targets: the model has no matrix "{target}": expected attention, mlp, all, or c_q, c_k, c_v, '
                f"c_proj, c_fc, optionally with their prefixes (mlp.c_proj, h.0.attn.c_q).{suggest(target, known)}"
            )
    smallest = sorted((name for name in shapes if name in meant), key=lambda name: min(shapes[name]))
    for name in smallest[:1]:
        if adapter.rank > min(shapes[name]):
            rows, columns = shapes[name]
            yield f"{where}.rank is {adapter.rank}, but {name} is {rows} × {columns}: at most {min(rows, columns)}"
    if adapter.bits is not None and adapter.group_size in _GROUP_SIZES and sizes.width % adapter.group_size:
        fitting = [str(size) for size in _GROUP_SIZES if sizes.width % size == 0]
        remedy = f"{where}.group_size={fitting[-1]}" if fitting else f"{where}.bits=null"
        yield (
            f"{where}.group_size is {adapter.group_size}, which does not divide the model's width of {sizes.width}. "
            f"Set {remedy}"
        )
