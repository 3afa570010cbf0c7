"""MLX's function transforms with the types of what they transform, which its stubs lose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar, cast

import mlx.core as mx

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Return `mx.compile(function)`."""
    return cast(Callable[P, R], mx.compile(function))


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
