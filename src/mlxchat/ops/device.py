"""The device that computes, and the one place that decides whether `mlxchat.cpu` takes the plain path's work.

`mlxchat.cpu` makes Linux CPUs fast: it has functions of the same names and meanings as those marked `accelerated`.
Metal and CUDA never use it, `MLXCHAT_CPU=plain` switches it off, and without that package everything still works.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import suppress
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import mlx.core as mx
import psutil

from mlxchat.errors import ConfigError
from mlxchat.ops.machine import available_cores

if TYPE_CHECKING:
    from mlxchat.config import MachineConfig
    from mlxchat.cpu.runtime import Remedy

P = ParamSpec("P")
R = TypeVar("R")


def backend() -> str:
    """Return 'metal', 'cuda' or 'cpu': where MLX computes by default."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def accelerated(function: Callable[P, R]) -> Callable[P, R]:
    """Let the function of the same name in `mlxchat.cpu` do the work where that is in use."""

    @wraps(function)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
        fastest: Callable[P, R] = _faster().get(function.__name__, function)
        return fastest(*args, **kwargs)

    return chosen


def _faster() -> dict[str, Callable[..., Any]]:
    """Return the CPU's own functions by name; none where the plain path computes."""
    if mx.default_device().type != mx.DeviceType.cpu or os.environ.get("MLXCHAT_CPU") == "plain":
        return {}
    return _functions_of_cpu()


@cache
def _functions_of_cpu() -> dict[str, Callable[..., Any]]:
    try:
        from mlxchat.cpu import decode, kernels, lanes
    except ModuleNotFoundError as error:
        if error.name != "mlxchat.cpu":
            raise
        return {}
    others = (lanes.make_lanes, lanes.step_context, decode.make_decoder)
    return {**vars(kernels), **{function.__name__: function for function in others}}


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
    if dtype == "auto":
        return default_dtype()
    return {"float32": mx.float32, "bfloat16": mx.bfloat16}[dtype]


def default_dtype() -> mx.Dtype:
    """Return the dtype in which the default device computes fast: float32 on a CPU, bfloat16 on a GPU."""
    return mx.float32 if backend() == "cpu" else mx.bfloat16


def prepare_machine(machine: MachineConfig, threads: int | None = None) -> mx.Dtype:
    """Apply device, memory limits and threads (None: the machine's); return the dtype to compute in."""
    dtype = select_device(machine.device, machine.compute_dtype)
    if machine.memory_limit_bytes is not None:
        mx.set_memory_limit(machine.memory_limit_bytes)
    if machine.cache_limit_bytes is not None:
        mx.set_cache_limit(machine.cache_limit_bytes)
    if machine.wired_limit_bytes is not None and backend() == "metal":  # elsewhere memory is not wired
        mx.set_wired_limit(machine.wired_limit_bytes)
    set_cpu_threads(threads or machine.blas_threads or available_cores())
    return dtype


def set_cpu_threads(count: int) -> None:
    """Set how many cores a matrix product on a CPU uses; a no-op where the platform's own BLAS decides."""
    with suppress(ModuleNotFoundError):
        from mlxchat.cpu import runtime

        runtime.set_blas_threads(count)


def remedy() -> Remedy | None:
    """Return which BLAS and compiler flags `mlxchat.cpu` gave MLX; None without that package."""
    try:
        from mlxchat.cpu import runtime
    except ModuleNotFoundError:
        return None
    return runtime.remedy()


def describe_device() -> dict[str, Any]:
    """Return name, backend, BLAS, cores, memory (bytes) and platform of this machine, for records."""
    info, done = mx.device_info(), remedy()
    return {
        "name": str(info.get("device_name", "unknown")),
        "backend": backend(),
        "blas": done.reason if done is not None else "MLX's own",
        "cores": available_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "platform": platform.platform(),
    }
