"""MLX's function transforms with the types of what they transform, which its stubs lose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar, cast

import mlx.core as mx

from mlxchat.ops.device import accelerated

# About row factors. `mx.compile` fuses a broadcast with what makes its operand, so that a reciprocal or a root of one
# number per row would be computed again for every element of the row. Where rows are scaled, the code here keeps the
# factors in an array without the row's axis and adds that with [..., None], which nothing is fused across. Scalars that
# are computed inside a compiled function go through `made_once` for the same reason.

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Return `mx.compile(function)`."""
    return cast(Callable[P, R], mx.compile(function))


def made_once(scalar: mx.array) -> mx.array:
    """Return a scalar as (1,), which kernels read instead of computing it again for every element."""
    return scalar[None]


@accelerated
def sum_rows(x: mx.array) -> mx.array:
    """Return the sums over the last axis (…,)."""
    return x.sum(-1)


class differentiable(Generic[P, R]):  # noqa: N801  (a decorator)
    """`mx.custom_function`: a function whose gradient is given by its `vjp`."""

    def __init__(self, function: Callable[P, R]) -> None:
        """Wrap the function."""
        self._function = mx.custom_function(function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call it."""
        return cast(R, self._function(*args, **kwargs))

    def vjp(self, gradient: Callable[..., object]) -> Callable[..., object]:
        """Take (primals, cotangents, outputs) → gradients of the primals."""
        self._function.vjp(gradient)
        return gradient
