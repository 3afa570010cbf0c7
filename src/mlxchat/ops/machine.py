"""This machine's cores and device, and the sizes that bound memory. Imports no MLX: plans and encoders use it."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from contextlib import suppress

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
    """Return 'float32' or 'bfloat16': what `machine.compute_dtype` means on `machine.device`.

    auto is bfloat16 on a GPU, and float32 on a CPU, where half precision is forty times slower.
    """
    if compute_dtype != "auto":
        return compute_dtype
    return "float32" if device != "gpu" and device_kind(device) == "cpu" else "bfloat16"
