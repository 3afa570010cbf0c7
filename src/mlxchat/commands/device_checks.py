"""`mlxchat doctor --gpu`: does this device compute what MLX's CPU computes?

The device works in bfloat16, the CPU in float32; each check states the largest difference that rounding explains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlxchat.composition.compose import compose_config
from mlxchat.config.wording import format_bytes
from mlxchat.model.gpt import GPT
from mlxchat.model.initial import init_weights
from mlxchat.model.sizes import sizes_of
from mlxchat.ops.device import backend, memory_limits, prepare_machine
from mlxchat.optim.optimizer import Optimizer, Rates
from mlxchat.store.environment import versions
from mlxchat.training.batches import mean_batch
from mlxchat.training.step import TrainStep

_ROWS, _ROW_TOKENS, _VOCABULARY, _STEPS = 4, 64, 512, 5

Outcome = tuple[float, float, str]
"""What was measured, the most that is accepted, and its unit."""


def check_device() -> bool:
    """Print a line for each check; return True if all passed."""
    machine, info = compose_config(["experiment=bench"]).config.machine, mx.device_info()
    prepare_machine(machine)
    limit = memory_limits(machine, backend(), info).get("memory")
    memory = f", at most {format_bytes(limit)} of memory" if limit else ""
    print(f"{info.get('device_name')} ({backend()}), MLX {versions()['mlx']}{memory}")
    passed = True
    for name, check in CHECKS.items():
        try:
            found, most, unit = check()
            told, is_right = f"{found:.2g} {unit}, at most {most:.2g} is accepted", found <= most
        except Exception as error:  # the device's faults are what is looked for
            told, is_right = f"{type(error).__name__}: {error}", False
        print(f"{'ok' if is_right else 'FAIL':<5} {name:<16} {told}", flush=True)
        passed = passed and is_right
    return passed


@contextmanager
def _on_cpu() -> Iterator[None]:
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        yield
    finally:
        mx.set_default_device(device)


def _difference(function: Callable[..., mx.array], *arrays: mx.array) -> float:
    """Return the 2-norm of the difference between device and CPU, as a share of the result's."""
    with _on_cpu():
        expected = function(*arrays)
        mx.eval(expected)
    found = function(*(array.astype(mx.bfloat16) for array in arrays)).astype(mx.float32)
    error = mx.linalg.norm((found - expected).flatten()) / mx.linalg.norm(expected.flatten())
    return error.item()  # type: ignore[return-value]  # of float32


def _product() -> Outcome:
    arrays = [mx.random.normal((512, 512), key=mx.random.key(seed)) for seed in (1, 2)]
    return _difference(mx.matmul, *arrays), 0.01, "relative difference"


def _attention() -> Outcome:
    def attend(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.125, mask="causal")

    arrays = [mx.random.normal((2, 4, 128, 64), key=mx.random.key(seed)) for seed in (1, 2, 3)]
    return _difference(attend, *arrays), 0.02, "relative difference"


def _packed_product() -> Outcome:
    matrix = mx.random.normal((512, 512), key=mx.random.key(1))
    packed = mx.quantize(matrix, group_size=64, bits=4)

    def multiply(rows: mx.array) -> mx.array:
        scales, biases = (each.astype(rows.dtype) for each in packed[1:])
        return mx.quantized_matmul(rows, packed[0], scales, biases, transpose=True, group_size=64, bits=4)

    return _difference(multiply, mx.random.normal((64, 512), key=mx.random.key(2))), 0.04, "relative difference"


def _losses(dtype: mx.Dtype) -> list[float]:
    """Return the losses of the first compiled steps of a small training."""
    config = compose_config(["experiment=bench", "model=d2"]).config
    sizes = sizes_of(replace(config.model, context_tokens=_ROW_TOKENS), config.architecture, _VOCABULARY)
    model = GPT(sizes)
    init_weights(model, seed=1)
    optimizer = Optimizer(model, config.optimizer, width=sizes.width)
    step = TrainStep(model, optimizer, micro_tokens=_ROWS * _ROW_TOKENS, dtype=dtype)
    ids = np.random.RandomState(1).randint(0, _VOCABULARY, (_ROWS, _ROW_TOKENS + 1)).astype(np.int32)
    batch = mean_batch([(row[:-1], row[1:]) for row in ids])
    return [step(batch, Rates(1.0, 0.9, 1.0), number)[0] for number in range(_STEPS)]


def _training() -> Outcome:
    with _on_cpu():
        expected = _losses(mx.float32)
    found = _losses(mx.bfloat16)
    worst = max(abs(one - other) for one, other in zip(found, expected, strict=True))
    return worst, 0.05, f"nats between losses of {_STEPS} steps ({found[0]:.3f} to {found[-1]:.3f})"


CHECKS: dict[str, Callable[[], Outcome]] = {
    "matrix product": _product,
    "attention": _attention,
    "4-bit product": _packed_product,
    "training": _training,
}
