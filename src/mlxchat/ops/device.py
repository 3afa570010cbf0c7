"""Which backend computes, and what it is made of."""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import mlx.core as mx
import psutil

from mlxchat.errors import ConfigError
from mlxchat.ops import blas


@cache
def backend() -> str:
    """Return 'metal', 'cuda' or 'cpu': where MLX computes by default."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def select_device(choice: str, dtype: str) -> mx.Dtype:
    """Make `choice` ('auto', 'cpu' or 'gpu') MLX's default device; return the dtype to compute in.

    `dtype` 'auto' is float32 on a CPU, where half precision is forty times slower, and bfloat16 on a GPU.

    Raises:
        ConfigError: there is no GPU.
    """
    if choice != "auto":
        try:
            mx.set_default_device(mx.cpu if choice == "cpu" else mx.gpu)
        except ValueError:
            raise ConfigError(
                "machine.device is gpu, but MLX finds no GPU here. Choose machine=auto or machine=cpu; for NVIDIA, "
                "install with: make setup DEVICE=cuda13"
            ) from None
        backend.cache_clear()
    if dtype == "auto":
        return mx.float32 if backend() == "cpu" else mx.bfloat16
    return {"float32": mx.float32, "bfloat16": mx.bfloat16}[dtype]


def describe_device() -> dict[str, Any]:
    """Return name, backend, BLAS, cores, memory (bytes) and platform of this machine, for records."""
    info = mx.device_info()
    return {
        "name": str(info.get("device_name", "unknown")),
        "backend": backend(),
        "blas": blas.remedy().reason,
        "cores": blas.available_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "platform": platform.platform(),
    }
