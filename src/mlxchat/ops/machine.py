"""This machine's cores and device, and the sizes that bound memory. Imports no MLX: plans and encoders use it."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys
from contextlib import suppress
from functools import cache

LOGITS = 1 << 26
"""Logits that are computed at a time, 256 MB in float32."""
CPU_LOGITS = 1 << 22
"""The same of `mlxchat.cpu`: few rows keep a chunk's logits in the cache …"""
CPU_LEAST_LOGITS_ROWS = 256
"""… but many spare BLAS from rearranging the head for each chunk."""
CPU_ATTENTION_TOKENS = 128
"""Queries of a block of attention of `mlxchat.cpu`."""
CPU_MOST_LANES = 16
"""More lanes would leave each of them too few rows."""
BATCH_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Rows of a KV cache: one of these, or a multiple of the last, so that few shapes are compiled."""
DECODED_ROWS = 32
"""Answers that are decoded at a time, at most."""
KEPT_TOKENS = 8192
"""Tokens of earlier prompts whose keys and values are kept for later ones."""
KV_TOKENS = 128
"""Tokens by which KV caches grow."""
PREFILL_TOKENS = 512
"""Tokens of a prompt that are read at a time."""
BUCKET_BYTES = 64 * 2**20
"""Bytes that one collective carries: more would keep a second copy of a whole model in memory."""


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_of_cores(processes: int) -> int:
    """Return how many of this machine's cores each of some processes gets that compute at the same time."""
    return max(1, available_cores() // processes)


def device_kind(choice: str) -> str:
    """Return 'cpu', 'metal' or 'cuda': where MLX will compute under `machine.device`."""
    if choice == "cpu":
        return "cpu"
    if sys.platform == "darwin":
        return "metal"
    for package in ("mlx-cuda-12", "mlx-cuda-13"):
        with suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(package)
            return "cuda"
    return "metal" if choice == "gpu" else "cpu"  # a plan for a Mac; a run here is refused


def dtype_name(device: str, compute_dtype: str) -> str:
    """Return 'float32' or 'bfloat16': what `machine.compute_dtype` means on `machine.device`."""
    return fast_dtype(device_kind(device)) if compute_dtype == "auto" else compute_dtype


def fast_dtype(kind: str) -> str:
    """Return 'bfloat16' for a GPU that has it, else 'float32': a CPU is forty times slower in half precision."""
    return "float32" if kind == "cpu" or (kind == "cuda" and not nvidia_has_bfloat16()) else "bfloat16"


@cache
def nvidia_has_bfloat16() -> bool:
    """Tell whether the first NVIDIA GPU has bfloat16: compute capability 8.0 (Ampere) and later. True without a GPU.

    The driver answers, not MLX, since keys of plans depend on the dtype.
    """
    device, major, compute_capability_major = ctypes.c_int(), ctypes.c_int(), 75
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), compute_capability_major, device)
    )
    return bool(failed) or major.value >= 8
