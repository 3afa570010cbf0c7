"""`mlxchat doctor --gpu`: does a training on this device have the losses that MLX's CPU computes?

The device works in bfloat16, the CPU in float32. Products, attention, gradients and the optimizer take part.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlxchat.composition.compose import compose_config
from mlxchat.data.packing import mean_batch
from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import init_weights
from mlxchat.model.sizes import sizes_of
from mlxchat.ops.device import backend, prepare_machine
from mlxchat.optim.optimizer import Optimizer, Rates
from mlxchat.runner.process import versions
from mlxchat.training.step import TrainStep

_ROWS, _ROW_TOKENS, _VOCABULARY, _STEPS = 4, 64, 512, 5
# Nats; rounding explains this much.
_LARGEST_DIFFERENCE = 0.05


def check_device() -> bool:
    """Print the largest difference of a loss from the CPU's; return True if rounding explains it."""
    prepare_machine(compose_config(["experiment=bench"]).config.machine)
    print(f"{mx.device_info().get('device_name')} ({backend()}), MLX {versions()['mlx']}")
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        expected = losses(mx.float32)
    finally:
        mx.set_default_device(device)
    worst = max(abs(one - other) for one, other in zip(losses(mx.bfloat16), expected, strict=True))
    passed = worst <= _LARGEST_DIFFERENCE
    told = f"losses of {_STEPS} steps differ by {worst:.2g} nats, at most {_LARGEST_DIFFERENCE} is accepted"
    print(f"{'ok' if passed else 'FAIL'}  {told}")
    return passed


def losses(dtype: mx.Dtype) -> list[float]:
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
