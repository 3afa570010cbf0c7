"""The default device, its limits, and MLX's function transforms with types."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, cast
from weakref import WeakMethod

import mlx.core as mx
import psutil

from mlxchat.errors import ConfigError
from mlxchat.ops.machine import available_cores, round_up

if TYPE_CHECKING:
    from mlxchat.config.schema import MachineConfig
    from mlxchat.cpu.runtime import Remedy

# MLX reads this when it compiles its first CUDA kernel; its own default lies in TMPDIR, which many systems clear.
if mx.cuda.is_available():
    _CACHE = Path(os.environ.get("MLXCHAT_CACHE") or Path.home() / ".cache" / "mlxchat")
    os.environ.setdefault("MLX_PTX_CACHE_DIR", str(_CACHE / "cuda-kernels" / importlib.metadata.version("mlx")))

P = ParamSpec("P")
R = TypeVar("R")


def backend() -> str:
    """Return the backend of MLX's default device: 'metal', 'cuda' or 'cpu'."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def select_device(choice: str, dtype: str) -> mx.Dtype:
    """Make `choice` ('auto', 'cpu' or 'gpu') MLX's default device; return the dtype ('auto': `default_dtype`)."""
    if choice != "auto":
        try:
            mx.set_default_device(mx.cpu if choice == "cpu" else mx.gpu)
        except ValueError:
            advice = "Choose machine=auto or machine=cpu; for NVIDIA, install with: make setup DEVICE=cuda13"
            raise ConfigError(f"machine.device is gpu, but MLX finds no GPU. {advice}") from None
    return default_dtype() if dtype == "auto" else cast(mx.Dtype, getattr(mx, dtype))


def default_dtype() -> mx.Dtype:
    """Return the default device's fast dtype: float32 on a CPU, bfloat16 on a GPU."""
    return mx.float32 if backend() == "cpu" else mx.bfloat16


def round_tokens(tokens: int) -> int:
    """Return a row's length, rounded up to few different ones, which suit the default device.

    On CUDA a new length costs a plan of cuDNN (tens of ms), and its attention's gradient needs multiples of 128.
    """
    return round_up(tokens, {"cuda": 128, "metal": 32}.get(backend(), 16))


def prepare_machine(machine: MachineConfig, threads: int | None = None) -> mx.Dtype:
    """Apply device, memory limits and threads (None: those of `machine`); return the dtype to compute in."""
    dtype = select_device(machine.device, machine.compute_dtype)
    for name, limit in memory_limits(machine, backend(), mx.device_info()).items():
        getattr(mx, f"set_{name}_limit")(limit)
    with suppress(ModuleNotFoundError):  # without `mlxchat.cpu` the platform's own BLAS decides
        from mlxchat.cpu import runtime

        runtime.set_blas_threads(threads or machine.blas_threads or available_cores())
    return dtype


def memory_limits(machine: MachineConfig, where: str, info: Mapping[str, Any]) -> dict[str, int]:
    """Return MLX's limits in bytes, by name (memory, cache, wired), on a backend with this `mx.device_info()`.

    The memory is `machine.memory_limit_bytes`, else what Metal recommends or 95 % of a CUDA device's memory. On a Mac
    all that Metal recommends may be wired, as in mlx-lm, and half of it may stay cached for other shapes.
    """
    recommended = int(info.get("max_recommended_working_set_size", 0))
    most = {"metal": recommended, "cuda": int(0.95 * info.get("total_memory", 0))}.get(where, 0)
    limit = machine.memory_limit_bytes or most
    if not limit:
        return {}
    if where == "metal":
        return {"memory": limit, "cache": limit // 2, "wired": min(limit, most)}
    return {"memory": limit, "cache": limit}


def remedy() -> Remedy | None:
    """Return which BLAS and compiler flags `mlxchat.cpu` gave MLX; None without that package."""
    try:
        from mlxchat.cpu import runtime
    except ModuleNotFoundError:
        return None
    return runtime.remedy()


def describe_device() -> dict[str, Any]:
    """Return name, backend, BLAS, cores, memory (bytes) and platform of this machine, for records."""
    done = remedy()
    return {
        "name": str(mx.device_info().get("device_name", "unknown")),
        "backend": backend(),
        "blas": done.reason if done is not None else "MLX's own",
        "cores": available_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "platform": platform.platform(),
    }


# MLX's function transforms. `mx.compile` fuses a broadcast with the computation of its operand and would recompute a
# root of one number per row for every element. Nothing is fused across [..., None], so row factors and scalars get it.


def compiled_method(method: Callable[P, R]) -> Callable[P, R]:
    """Return a method compiled by `mx.compile`, which does not keep its object and that object's arrays alive."""
    held = WeakMethod(method)

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = held()
        assert bound is not None, "the caller holds the object"
        return bound(*args, **kwargs)

    return mx.compile(call)


class differentiable(Generic[P, R]):  # noqa: N801  (a decorator)
    """`mx.custom_function` with types: a function whose gradient is defined by `vjp`."""

    def __init__(self, function: Callable[P, R]) -> None:
        self._function = mx.custom_function(function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function."""
        return cast(R, self._function(*args, **kwargs))

    def vjp(self, gradient: Callable[..., object]) -> Callable[..., object]:
        """Register the function (primals, cotangents, outputs) → gradients of the primals."""
        self._function.vjp(gradient)
        return gradient
