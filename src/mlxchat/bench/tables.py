"""Tables of measurements: their style, and those of a training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxchat.config.wording import format_bytes, format_count

_BUSY = "too much other work on this machine for shares: measure again when it is quiet"


def print_tables(record: dict[str, Any], stream: TextIO) -> None:
    """Print what `measure_training` returned."""
    console = Console(file=stream, highlight=False)
    bench, sizes, device = record["bench"], record["sizes"], record["device"]
    what = (
        f"{record['model']} {record['architecture']}: {format_count(record['num_parameters'])} parameters, "
        f"{sizes['num_layers']} layers of width {sizes['width']}, vocabulary {sizes['vocab_size']}, "
        f"{bench['batch_rows']} × {bench['row_tokens']} tokens, {record['optimizer']['kind']} "
        f"{record['optimizer']['variant']}, {record['dtype']}{_adapter(record)}"
    )
    console.print(Text(what, style="bold"))
    versions = " ".join(f"{name} {record['versions'].get(name, '?')}" for name in ("mlxchat", "mlx"))
    where = f"{device['name']} ({device['backend']}), {device['cores']} cores, {record['blas']}; {versions}"
    console.print(Text(where))
    console.print(_speeds(record))


def _speeds(record: dict[str, Any]) -> Table:
    table = make_table("", "measured", "", left=(0, 2))
    seconds, forward = record["seconds"], record["forward_seconds"]
    table.add_row("training step", f"{record['tokens_per_second']:,.0f} tok/s", _spread(seconds))
    table.add_row("forward (validation)", f"{record['forward_tokens_per_second']:,.0f} tok/s", _spread(forward))
    flops = f"{format_count(record['flops_per_token'])} FLOPs per token"
    table.add_row("model's FLOPs", f"{record['gflops']:,.1f} GFLOP/s", flops)
    if record["peak_gflops"] is None:
        table.add_row("peak of the device", "unknown", "")
    else:
        table.add_row("peak of the device", f"{record['peak_gflops']:,.1f} GFLOP/s", "published")
        share = record["share_of_peak"]
        table.add_row("share of the peak", "unknown" if share is None else f"{share:.1%}", "" if share else _BUSY)
    held = f"MLX {format_bytes(record['mlx_peak_bytes'])}, process +{format_bytes(record['resident_growth_bytes'])}"
    table.add_row("peak memory", format_bytes(record["peak_bytes"]), held)
    table.add_row("peak of the process", format_bytes(record["peak_rss_bytes"]), "resident, all libraries included")
    return table


def _adapter(record: dict[str, Any]) -> str:
    adapter = record["adapter"]
    if adapter is None:
        return ""
    base = "" if adapter["bits"] is None else f" on {adapter['bits']} bits"
    trained = format_count(record["num_trained_parameters"])
    return f", {adapter['kind']} of rank {adapter['rank']}{base} ({trained} trained)"


def make_table(*titles: str, left: Sequence[int] = (0,)) -> Table:
    """Return a table without rows, whose columns `left` are left-aligned."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for place, title in enumerate(titles):
        table.add_column(title, justify="left" if place in left else "right")
    return table


def _spread(seconds: list[float]) -> str:
    return f"{min(seconds):.3f} to {max(seconds):.3f} s, {len(seconds)} times"
