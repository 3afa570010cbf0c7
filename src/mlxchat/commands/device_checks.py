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
from mlxchat.model.gpt import GPT
from mlxchat.model.initial import init_weights
from mlxchat.model.sizes import sizes_of
from mlxchat.ops.device import backend, prepare_machine
from mlxchat.optim.optimizer import Optimizer, Rates
from mlxchat.store.environment import versions
from mlxchat.training.batches import mean_batch
from mlxchat.training.step import TrainStep

_ROWS, _ROW_TOKENS, _VOCABULARY, _STEPS = 4, 64, 512, 5

Outcome = tuple[float, float, str]
"""What was measured, the most that is accepted, and its unit."""


def check_device() -> bool:
    """Print a line for each check; return True if all passed."""
    prepare_machine(compose_config(["experiment=bench"]).config.machine)
    print(f"{mx.device_info().get('device_name')} ({backend()}), MLX {versions()['mlx']}")
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


def _packed_product() -> Outcome:
    matrix, rows = (mx.random.normal((512, 512), key=mx.random.key(seed)) for seed in (1, 2))

    def multiply(dtype: mx.Dtype) -> mx.array:
        packed, scales, biases = mx.quantize(matrix.astype(dtype), group_size=64, bits=4)
        return mx.quantized_matmul(rows.astype(dtype), packed, scales, biases, group_size=64, bits=4)

    with _on_cpu():
        expected = multiply(mx.float32)
        mx.eval(expected)
    error = mx.linalg.norm(multiply(mx.bfloat16) - expected) / mx.linalg.norm(expected)
    return float(error), 0.04, "relative difference"


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
    "4-bit product": _packed_product,
    "training": _training,
}
