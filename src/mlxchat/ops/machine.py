"""This machine's cores and device, and chunk sizes that bound memory. Imports no MLX, because plans use it."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys
from contextlib import suppress
from functools import cache

LOGITS = 1 << 26
"""Logits of a chunk, 256 MB in float32."""
CPU_LOGITS = 1 << 22
"""Logits of a chunk in `mlxchat.cpu`: few rows fit into the cache …"""
CPU_LEAST_LOGITS_ROWS = 256
"""… but with fewer rows than this BLAS would spend its time packing the head."""
CPU_ATTENTION_TOKENS = 128
"""Queries per block of attention in `mlxchat.cpu`."""
CPU_MOST_LANES = 16
"""With more lanes each would have too few rows."""
BATCH_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Rows of a KV cache: one of these, or a multiple of the last, so that few shapes are compiled."""
DECODED_ROWS = 64
"""Maximum number of answers decoded together."""
KEPT_TOKENS = 8192
"""Tokens of earlier prompts whose keys and values are kept for prefix reuse."""
KV_TOKENS = 256
"""Tokens by which KV caches grow."""
PREFILL_TOKENS = 512
"""Tokens per chunk of prefill."""
BUCKET_BYTES = 64 * 2**20
"""Maximum bytes of a collective, so that no second copy of a whole model is in memory."""


def round_up(count: int, step: int) -> int:
    """Return the next multiple of `step`."""
    return -(-int(count) // step) * step


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def limit_cores(part: int, parts: int) -> None:
    """Restrict this process to one of `parts` equal shares of its cores; has no effect on a Mac."""
    if parts > 1 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, len(cores) // parts)
        first = part * share % len(cores)
        os.sched_setaffinity(0, cores[first : first + share])


def device_kind(choice: str) -> str:
    """Return MLX's backend for `machine.device`: 'cpu', 'metal' or 'cuda'."""
    if choice == "cpu":
        return "cpu"
    if sys.platform == "darwin":
        return "metal"
    for package in ("mlx-cuda-12", "mlx-cuda-13"):
        with suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(package)
            return "cuda"
    return "metal" if choice == "gpu" else "cpu"  # gpu: a plan for a Mac; a run here is refused


def dtype_name(device: str, compute_dtype: str) -> str:
    """Return 'float32' or 'bfloat16' for `machine.device` and `machine.compute_dtype`."""
    return fast_dtype(device_kind(device)) if compute_dtype == "auto" else compute_dtype


def fast_dtype(kind: str) -> str:
    """Return 'bfloat16' for a GPU that supports it, else 'float32': CPUs are forty times slower in half precision."""
    return "float32" if kind == "cpu" or (kind == "cuda" and not nvidia_has_bfloat16()) else "bfloat16"


@cache
def nvidia_has_bfloat16() -> bool:
    """Return whether the first NVIDIA GPU has bfloat16 (compute capability 8.0, Ampere, or later); True without a GPU.

    It reads the driver, not MLX, because keys in plans depend on the dtype and plans do not load MLX.
    """
    device, major = ctypes.c_int(), ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)
    major_capability = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(major), major_capability, device)
    return bool(failed) or major.value >= 8
