"""The default device, its streams and transforms; the only module that decides whether `mlxchat.cpu` is used.

`mlxchat.cpu` makes Linux CPUs fast: it replaces functions marked `accelerated` by functions of the same names. Metal
and CUDA never use it, `MLXCHAT_CPU=plain` disables it, and without that package everything works, slower.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache, wraps
from itertools import pairwise
from types import MethodType
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, cast
from weakref import WeakMethod

import mlx.core as mx
import psutil

from mlxchat.errors import ConfigError
from mlxchat.ops.machine import available_cores, fast_dtype

if TYPE_CHECKING:
    from mlxchat.config.schema import MachineConfig
    from mlxchat.cpu.runtime import Remedy

_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
P = ParamSpec("P")
R = TypeVar("R")


def backend() -> str:
    """Return the backend of MLX's default device: 'metal', 'cuda' or 'cpu'."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def accelerated(function: Callable[P, R]) -> Callable[P, R]:
    """Replace a function by the one of the same name in `mlxchat.cpu` where that is in use."""

    @wraps(function)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
        fastest: Callable[P, R] = _faster().get(function.__name__, function)
        return fastest(*args, **kwargs)

    return chosen


def _faster() -> dict[str, Callable[..., Any]]:
    """Return name → function of `mlxchat.cpu`; empty for the plain path."""
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

    `dtype` 'auto' is `default_dtype`.

    Raises:
        ConfigError: there is no GPU.
    """
    if choice != "auto":
        try:
            mx.set_default_device(mx.cpu if choice == "cpu" else mx.gpu)
        except ValueError:
            raise ConfigError(
                "machine.device is gpu, but MLX finds no GPU. Choose machine=auto or machine=cpu; for NVIDIA, "
                "install with: make setup DEVICE=cuda13"
            ) from None
    return default_dtype() if dtype == "auto" else _DTYPES[dtype]


def default_dtype() -> mx.Dtype:
    """Return the default device's `fast_dtype`."""
    return _DTYPES[fast_dtype(backend())]


def product_shape() -> tuple[int, int, int]:
    """Return rows, inner width and columns of a matrix product that saturates the default device.

    On a CPU it takes 10 to 20 ms, so that some of a hundred run without interruption by other programs.
    """
    return (1024, 512, 1024) if backend() == "cpu" else (4096, 4096, 4096)


def prepare_machine(machine: MachineConfig, threads: int | None = None) -> mx.Dtype:
    """Apply device, memory limits and threads (None: those of `machine`); return the dtype to compute in."""
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
    """Set the number of cores of a matrix product on a CPU; a no-op where the platform's own BLAS decides."""
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


# Streams


class Lanes:
    """Streams that share the rows of a batch: MLX's default one, or one for each core of a CPU (`mlxchat.cpu`)."""

    def __init__(self, streams: Sequence[mx.Stream]) -> None:
        self.streams = list(streams)

    def __len__(self) -> int:
        return len(self.streams)

    def deal(self, count: int) -> list[slice]:
        """Return at most one slice of `count` rows per lane, none empty; sizes differ by at most 1."""
        parts = min(len(self), count)
        borders = [count * part // parts for part in range(parts + 1)]
        return [slice(start, stop) for start, stop in pairwise(borders)]

    def run(self, calls: Sequence[Callable[[], R]]) -> list[R]:
        """Return the results of calls, the i-th built on lane i; `mx.eval` of the results runs them in parallel."""
        results = []
        for stream, call in zip(self.streams, calls, strict=False):
            with mx.stream(stream):
                results.append(call())
        return results

    def sharing(self, parts: int) -> AbstractContextManager[None]:
        """Return the context in which `parts` lanes are evaluated."""
        return nullcontext()


@accelerated
def make_lanes() -> Lanes:
    """Return the lanes of the default device."""
    return Lanes([mx.default_stream(mx.default_device())])


# MLX's function transforms with types

# Row factors: `mx.compile` fuses a broadcast with the computation of its operand, so a reciprocal or root of one number
# per row would be recomputed for every element of the row. Therefore row factors are kept in an array without the row's
# axis, which is added with [..., None]; nothing is fused across that. Scalars computed inside a compiled function go
# through `made_once` for the same reason.


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Return `mx.compile(function)`; a compiled method does not keep its object alive.

    So an object that holds its own compiled method is freed, with its arrays, as soon as nothing else holds it.
    """
    if isinstance(function, MethodType):
        method = WeakMethod(function)

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = method()
            assert bound is not None, "the caller holds the object"
            return cast(R, bound(*args, **kwargs))

        return cast(Callable[P, R], mx.compile(call))
    return cast(Callable[P, R], mx.compile(function))


def made_once(scalar: mx.array) -> mx.array:
    """Return a scalar as (1,), which kernels read instead of recomputing it for every element."""
    return scalar[None]


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
