"""The parts of a training step, each compiled and run alone with the shapes of the step.

Alone, a part shares no cache and no fused kernel with the others: the sum of the parts is near the step, not equal.

Shapes: B rows of a micro-batch, T tokens, C width, N = B T, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxchat.model.gpt import GPT, rms_norm, window_mask
from mlxchat.model.parameters import flatten_parameters, module_at, set_parameters
from mlxchat.model.recompute import recomputed
from mlxchat.ops.loss import cross_entropy_sum, token_losses
from mlxchat.optim.optimizer import Flat, Optimizer, Rates

Work = Callable[[], object]


@dataclass(frozen=True)
class Part:
    """A piece of a step."""

    name: str
    times: float
    """Repetitions per step."""
    prepare: Callable[[], Work]
    """Create the inputs and return a function that runs the part once. Deferred to save memory."""


def phases_of_step(
    model: GPT, optimizer: Optimizer, ids: mx.array, rates: Rates, *, dtype: mx.Dtype, recompute: bool
) -> list[Part]:
    """Return 'forward', 'forward_and_backward' and 'optimizer' of a step on the micro-batch `ids` (B, T), once each."""
    targets, weights = ids.reshape(-1), mx.full(ids.size, 1 / ids.size)

    def hidden(parameters: Flat) -> mx.array:
        set_parameters(model, {name: value.astype(dtype) for name, value in parameters.items()})
        model.run_layer = recomputed if recompute else GPT.run_layer
        return model.hidden(ids).reshape(-1, model.sizes.width)

    def loss_alone(parameters: Flat) -> mx.array:
        return token_losses(hidden(parameters), model.head_weight, targets).mean()

    def loss(parameters: Flat) -> mx.array:
        return cross_entropy_sum(hidden(parameters), model.head_weight, targets, weights)

    def applied(function: Callable[[Flat], Any]) -> Callable[[], Work]:
        return lambda: _compiled(_keeping_parameters(model, function), flatten_parameters(model))

    return [
        Part("forward", 1, applied(loss_alone)),
        Part("forward_and_backward", 1, applied(mx.value_and_grad(loss))),
        Part("optimizer", 1, partial(_optimizer, model, optimizer, rates)),
    ]


def parts_of_step(model: GPT, ids: mx.array, *, dtype: mx.Dtype) -> list[Part]:
    """Return 'embedding', 'attention', 'mlp' and 'head_and_loss', each forward and backward.

    There is an 'attention' for every kind of layer: with this window, with or without a value embedding.
    """
    sizes = model.sizes
    kinds = [(window, layer in sizes.value_embedding_layers) for layer, window in enumerate(sizes.windows)]
    return [
        Part("embedding", 1, partial(_embedding, model, ids, dtype)),
        *(
            Part("attention", count, partial(_attention, model, kinds.index(kind), ids.shape, dtype))
            for kind, count in Counter(kinds).items()
        ),
        Part("mlp", sizes.num_layers, partial(_mlp, model, ids.shape, dtype)),
        Part("head_and_loss", 1, partial(_head_and_loss, model, ids, dtype)),
    ]


def _embedding(model: GPT, ids: mx.array, dtype: mx.Dtype) -> Work:
    tables = [module_at(model, name) for name in model.tables()]

    def look_up(*weights: mx.array) -> list[mx.array]:
        first, *others = (weight.astype(dtype)[ids] for weight in weights)
        return [rms_norm(first), *others]

    return _forward_and_backward(look_up, [table.weight for table in tables])


def _attention(model: GPT, layer: int, shape: tuple[int, ...], dtype: mx.Dtype) -> Work:
    attention = model.transformer["h"][layer].attn
    inputs = [_random((*shape, model.sizes.width), dtype)]
    if layer in model.sizes.value_embedding_layers:
        inputs.append(_random((*shape, model.sizes.kv_width), dtype))
    mask = window_mask(shape[1], model.sizes.windows[layer], dtype)
    return _layer(attention, lambda x, value=None: x + attention(rms_norm(x), value, mask), inputs, dtype)


def _mlp(model: GPT, shape: tuple[int, ...], dtype: mx.Dtype) -> Work:
    mlp = model.transformer["h"][0].mlp
    return _layer(mlp, lambda x: x + mlp(rms_norm(x)), [_random((*shape, model.sizes.width), dtype)], dtype)


def _head_and_loss(model: GPT, ids: mx.array, dtype: mx.Dtype) -> Work:
    targets, weights = ids.reshape(-1), mx.full(ids.size, 1 / ids.size)

    def loss(hidden: mx.array, head: mx.array) -> list[mx.array]:
        return [cross_entropy_sum(hidden, head.astype(dtype), targets, weights)]

    return _forward_and_backward(loss, [rms_norm(_random((ids.size, model.sizes.width), dtype)), model.head_weight])


def _optimizer(model: GPT, optimizer: Optimizer, rates: Rates) -> Work:
    parameters = flatten_parameters(model)
    gradients = {name: 0.01 * _random(value.shape, mx.float32) for name, value in parameters.items()}
    mx.eval(gradients)

    def work() -> None:
        optimizer.update(model, dict(gradients), rates)
        set_parameters(model, parameters)

    return work


def _layer(module: nn.Module, call: Callable[..., mx.array], inputs: list[mx.array], dtype: mx.Dtype) -> Work:
    """Return a function that runs a module with the gradients of its inputs and parameters."""
    names, values = zip(*flatten_parameters(module).items(), strict=True)

    def run(*arrays: mx.array) -> list[mx.array]:
        weights = (weight.astype(dtype) for weight in arrays[len(inputs) :])
        set_parameters(module, dict(zip(names, weights, strict=True)))
        return [call(*arrays[: len(inputs)])]

    return _forward_and_backward(_keeping_parameters(module, run), [*inputs, *values])


def _forward_and_backward(function: Callable[..., list[mx.array]], primals: list[mx.array]) -> Work:
    """Return a function that runs a function and its gradients in all arguments, for random cotangents."""
    cotangents = [_random(output.shape, output.dtype) for output in function(*primals)]
    mx.eval(primals, cotangents)
    return _compiled(lambda *arrays: mx.vjp(function, list(arrays), cotangents), *primals)


def _keeping_parameters(module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, wrapped to restore the module's parameters, which tracing replaces."""

    def run(*arguments: Any) -> Any:
        before = flatten_parameters(module)
        try:
            return function(*arguments)
        finally:
            set_parameters(module, before)

    return run


def _compiled(function: Callable[..., Any], *arguments: Any) -> Work:
    fast = mx.compile(function)
    return lambda: mx.eval(fast(*arguments))


def _random(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(0)).astype(dtype)
