"""How many floating-point operations per second this device can do, to compare a training with."""

from __future__ import annotations

import json
import platform
import re
import time
from contextlib import suppress
from functools import cache
from importlib.metadata import version

import mlx.core as mx

from mlxchat.hub.cache import cache_folder, write_json
from mlxchat.ops.device import backend
from mlxchat.ops.lanes import Lanes

# Rows, inner width and columns of the product: about what a block of a small model multiplies.
_SHAPE = 2048, 1024, 4096
_PROBE = 512

# Dense TFLOP/s of (bfloat16, float32) by words of the device's name, the more specific first; None: no figure that a
# maker published. NVIDIA: data sheets and architecture white papers, which state products with structured sparsity at
# twice these; float32 is TF32, in which MLX multiplies there. Apple: its announcements of the chips, float32.
_TABLE: tuple[tuple[tuple[str, ...], float | None, float | None], ...] = (
    (("h200", "nvl"), 836.0, 418.0),
    (("h200",), 989.4, 494.7),
    (("h100", "nvl"), 835.0, 417.5),
    (("h100", "pcie"), 756.0, 378.0),
    (("h100",), 989.4, 494.7),
    (("a100",), 312.0, 156.0),
    (("l40s",), 362.0, None),
    (("l4",), 121.0, None),
    (("rtx", "4090"), 165.2, None),
    (("rtx", "5090"), 209.5, None),
    (("apple", "m1", "ultra"), None, 21.0),
    (("apple", "m1", "max"), None, 10.4),
    (("apple", "m1", "pro"), None, 5.2),
    (("apple", "m1"), None, 2.6),
    (("apple", "m2", "ultra"), None, None),
    (("apple", "m2", "max"), None, None),
    (("apple", "m2", "pro"), None, None),
    (("apple", "m2"), None, 3.6),
)


def peak_flops(dtype: mx.Dtype) -> float | None:
    """Return the peak FLOP/s of the default device in `dtype`: measured on a CPU, from a table on a GPU.

    None: unknown.
    """
    if backend() == "cpu":
        return measured_peak_flops() if dtype == mx.float32 else None
    return tabled_peak_flops(str(mx.device_info().get("device_name", "")), dtype)


@cache
def measured_peak_flops() -> float:
    """Return the highest rate in FLOP/s of float32 matrix products ever measured on this machine with these cores.

    Measured once per process; the best is kept in the cache folder, since other work slows a single measurement.
    """
    return measure_peak_flops()


def measure_peak_flops(seconds: float = 0.3) -> float:
    """Measure again for about `seconds`; return the best of this and of all earlier measurements on this machine.

    The products are 2048×1024×4096, unless this machine is too slow for even one of them in that time.
    """
    rows, inner, columns = _SHAPE
    rate = _rate(_PROBE, _PROBE, _PROBE, seconds / 10)
    if 2 * rows * inner * columns / rate < seconds:
        rate = max(rate, _rate(rows, inner, columns, seconds))
    mx.clear_cache()
    return _best_kept(rate)


def _best_kept(rate: float) -> float:
    """Return the larger of a rate and the kept one of this machine, and keep it."""
    path, key = cache_folder() / "peaks.json", f"{platform.node()}, {len(Lanes())} cores, mlx {version('mlx')}"
    try:
        kept = json.loads(path.read_bytes())
        best = max(rate, float(kept[key]))
    except (OSError, ValueError, TypeError, KeyError):  # nothing kept, or not by us
        kept, best = {}, rate
    if best == rate:
        with suppress(OSError):
            write_json(path, {**(kept if isinstance(kept, dict) else {}), key: best})
    return best


def tabled_peak_flops(device_name: str, dtype: mx.Dtype) -> float | None:
    """Return the published dense peak in FLOP/s of a GPU by its name; None: not known."""
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    for wanted, half, single in _TABLE:
        if words.issuperset(wanted):
            teraflops = {mx.bfloat16: half, mx.float32: single}.get(dtype)
            return None if teraflops is None else teraflops * 1e12
    return None


def _rate(rows: int, inner: int, columns: int, seconds: float) -> float:
    """Return the highest rate of the products that fit in so many seconds; the first, which wake threads, are extra.

    Each core does products of its own, as in training: threads that share one wait for each other by spinning, and
    beside another program's work they have shown a thirtieth of the rate.
    """
    lanes = Lanes()
    one, other = mx.ones((rows, inner)), mx.ones((inner, columns))

    def products() -> list[mx.array]:
        return lanes.run([lambda: one @ other] * len(lanes))

    with lanes.sharing(len(lanes)):
        mx.eval(one, other, products())
        best, end = float("inf"), time.perf_counter() + seconds
        while best == float("inf") or time.perf_counter() < end:
            began = time.perf_counter()
            mx.eval(products())
            best = min(best, time.perf_counter() - began)
    return 2.0 * rows * inner * columns * len(lanes) / best
