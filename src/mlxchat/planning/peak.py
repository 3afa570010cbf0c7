"""The highest FLOP/s of this device: published, or the best ever measured or reached by a training on this machine."""

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
from mlxchat.ops.device import default_dtype, make_lanes, product_shape

_ROUNDS, _ROUND_SECONDS = 3, 0.15

# Dense TFLOP/s of (bfloat16, float32) by words of the device's name, the more specific first; None: not published.
# NVIDIA: the architecture white papers (Ampere, Ada, Hopper, Blackwell) and data sheets, which state products with
# structured sparsity at twice these; float32 is TF32, MLX's default there.
# Apple: M1 from its announcements. M2: cores × 128 ALUs × 2 × 1.398 GHz with the most cores of each chip (19, 38, 76);
# the M2's 3.6 is also Apple's own. Their ALUs compute half precision at the rate of float32 (Metal Benchmarks).
# M3, M4, M5: published clocks contradict each other and Apple states none, so these are measured.
_TABLE: tuple[tuple[tuple[str, ...], float | None, float | None], ...] = (
    (("h200", "nvl"), 836.0, 418.0),
    (("h200",), 989.4, 494.7),
    (("h100", "nvl"), 835.0, 417.5),
    (("h100", "pcie"), 756.0, 378.0),
    (("h100",), 989.4, 494.7),
    (("a100",), 312.0, 156.0),
    (("l40s",), 362.0, 183.0),
    (("l4",), 121.0, 60.0),
    (("rtx", "4090"), 165.2, 82.6),
    (("rtx", "5090"), 209.5, 104.8),
    (("apple", "m1", "ultra"), 21.0, 21.0),
    (("apple", "m1", "max"), 10.4, 10.4),
    (("apple", "m1", "pro"), 5.2, 5.2),
    (("apple", "m1"), 2.6, 2.6),
    (("apple", "m2", "ultra"), 27.2, 27.2),
    (("apple", "m2", "max"), 13.6, 13.6),
    (("apple", "m2", "pro"), 6.8, 6.8),
    (("apple", "m2"), 3.6, 3.6),
)


def peak_flops(dtype: mx.Dtype) -> float | None:
    """Return the highest known FLOP/s of the default device in `dtype`.

    It is the published figure or, without one, measured once per process; a training that was faster counts, too.
    None: half precision where MLX emulates it, as on a CPU.
    """
    if dtype != mx.float32 and dtype != default_dtype():
        return None
    return keep_peak(dtype, tabled_peak_flops(_device_name(), dtype) or _measured(dtype))


def keep_peak(dtype: mx.Dtype, rate: float) -> float:
    """Return the highest FLOP/s ever seen on this machine, `rate` included, and keep it in the cache folder."""
    device = f"{_device_name()}, {len(make_lanes())} lanes, {dtype}"
    path, key = cache_folder() / "peaks.json", f"{platform.node()}, {device}, mlx {version('mlx')}"
    kept = {}
    with suppress(OSError, ValueError):  # nothing kept, or damaged
        found = json.loads(path.read_bytes())
        kept = found if isinstance(found, dict) else {}
    best = max(rate, kept.get(key, 0.0))
    if best == rate:
        with suppress(OSError):
            write_json(path, kept | {key: best})
    return float(best)


def raise_peak(dtype: mx.Dtype, rate: float) -> float:
    """Return the peak once a training was faster than the known one: the better of its rate and a new measurement."""
    return keep_peak(dtype, max(rate, measure_flops(dtype)))


def measure_flops(dtype: mx.Dtype) -> float:
    """Return the rate of the fastest of many matrix products, in a few short rounds."""
    rate = max(_rate(product_shape(), dtype, _ROUND_SECONDS) for _ in range(_ROUNDS))
    mx.clear_cache()
    return rate


@cache
def _measured(dtype: mx.Dtype) -> float:
    return measure_flops(dtype)


def _device_name() -> str:
    return str(mx.device_info().get("device_name", ""))


def tabled_peak_flops(device_name: str, dtype: mx.Dtype) -> float | None:
    """Return the published dense peak in FLOP/s of a GPU by its name; None: not known."""
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    for wanted, half, single in _TABLE:
        if words.issuperset(wanted):
            teraflops = {mx.bfloat16: half, mx.float32: single}.get(dtype)
            return None if teraflops is None else teraflops * 1e12
    return None


def _rate(shape: tuple[int, int, int], dtype: mx.Dtype, seconds: float) -> float:
    """Return the highest rate of the products computed in `seconds`, after a first one that is not counted.

    Each core computes its own products, as in training: threads that share a product spin while they wait, which beside
    another program reduced the rate to a thirtieth.
    """
    rows, inner, columns = shape
    lanes = make_lanes()
    one, other = mx.ones((rows, inner), dtype=dtype), mx.ones((inner, columns), dtype=dtype)

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
