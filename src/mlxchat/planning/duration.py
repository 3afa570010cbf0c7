"""Predicted time of steps: of similar artifacts, for pretrainings from FLOPs. Published peaks of devices."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mlxchat.model.sizes import flops_per_token, sizes_of
from mlxchat.ops.machine import device_kind
from mlxchat.planning.horizon import derive_hyperparameters
from mlxchat.planning.memory import Training
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.reasons import Estimate, nearest_of
from mlxchat.store.store import Store

if TYPE_CHECKING:
    import mlx.core as mx

# Reached by trainings of this project on CPUs; on GPUs an assumption.
_SHARE_OF_PEAK = 0.4
# A day of the slowest machine that is likely: 12 GFLOP/s.
_LONG_FLOPS = 1e15


def estimate_steps(plan: Iterable[PlannedStep], store: Store) -> dict[str, Estimate | None]:
    """Return step → estimate for unfinished steps: of a pretraining its prediction, else a similar artifact's; or None.

    Similar is the artifact of the same stage and label (a model's size, a corpus) with the fewest other differences in
    its config: a small model's duration says nothing about a large one's.
    """
    found: dict[str, Estimate | None] = {}
    for step in plan:
        if step.done:
            continue
        made = (made for made in store.recent(step.stage.name) if made["name"].rpartition("-")[0] == step.title)
        found[step.name] = _predict(step, store) if step.stage.name == "pretrain" else None
        if found[step.name] is None and (near := nearest_of(step.identity, made)) is not None:
            size = sum(file["bytes"] for file in near["outputs"])
            found[step.name] = Estimate(seconds=near["seconds"], bytes=size, artifact=near["name"])
    return found


def _predict(step: PlannedStep, store: Store) -> Estimate | None:
    """Return the estimate of a pretraining with a known speed; the bytes are those of weights and moments.

    The speed is that of the finished pretraining with the nearest FLOPs per token on the same kind of device, else
    `machine.training_flops`, else, for a training that may take a day, a share of this device's peak.
    """
    config = step.config
    sizes = sizes_of(config.model, config.architecture, config.tokenizer.vocab_size)
    derived, per_token = derive_hyperparameters(config, sizes), flops_per_token(sizes)
    flops = per_token * derived.batch_tokens * derived.num_iterations
    kind = device_kind(config.machine.device)
    made = [each for each in store.recent("pretrain") if _speed(each) and each["device"]["backend"] == kind]
    speed, source = config.machine.training_flops, "machine.training_flops"
    if made:
        nearest = min(made, key=lambda each: abs(math.log(each["derived"]["flops_per_token"] / per_token)))
        speed, source = _speed(nearest), nearest["name"]
    elif speed is None and flops > _LONG_FLOPS and config.pretrain.max_seconds is None:
        from mlxchat.ops.device import select_device  # imports MLX

        dtype = select_device(config.machine.device, config.machine.compute_dtype)
        speed, source = _SHARE_OF_PEAK * (peak_flops(dtype) or measure_flops(dtype)), "this device's peak"
    seconds, most = flops / speed if speed is not None else math.inf, config.pretrain.max_seconds
    if most is not None and most <= seconds:
        seconds, source = most, "pretrain.max_seconds"
    if seconds == math.inf:
        return None
    held = Training(sizes=sizes, optimizer=config.optimizer, rows=1, row_tokens=1).held_bytes
    return Estimate(seconds=seconds, bytes=held, artifact=source)


def _speed(made: Mapping[str, Any]) -> float:
    """Return the FLOP/s of a finished pretraining; 0: not in its manifest."""
    per_token: float = made.get("derived", {}).get("flops_per_token", 0)
    return per_token * (made.get("tokens_per_second") or 0)


# Dense TFLOP/s of (bfloat16, float32) by words of the device's name, the more specific first.
# NVIDIA: the white papers and data sheets, without sparsity; float32 is TF32, MLX's default there. Apple: M1 from its
# announcements, M2 as cores × 128 ALUs × 2 × 1.398 GHz, half precision at the rate of float32.
_PEAKS = {
    "h200 nvl": (836.0, 418.0),
    "h200": (989.4, 494.7),
    "h100 nvl": (835.0, 417.5),
    "h100 pcie": (756.0, 378.0),
    "h100": (989.4, 494.7),
    "a100": (312.0, 156.0),
    "l40s": (362.0, 183.0),
    "l4": (121.0, 60.0),
    "rtx 4090": (165.2, 82.6),
    "rtx 5090": (209.5, 104.8),
    "m1 ultra": (21.0, 21.0),
    "m1 max": (10.4, 10.4),
    "m1 pro": (5.2, 5.2),
    "m1": (2.6, 2.6),
    "m2 ultra": (27.2, 27.2),
    "m2 max": (13.6, 13.6),
    "m2 pro": (6.8, 6.8),
    "m2": (3.6, 3.6),
}


def peak_flops(dtype: mx.Dtype, device_name: str | None = None) -> float | None:
    """Return the published dense peak in FLOP/s of a GPU by its name (None: the default device); None: not known."""
    import mlx.core as mx

    from mlxchat.ops.device import backend

    if device_name is None:
        device_name = "" if backend() == "cpu" else str(mx.device_info().get("device_name", ""))
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    for name, (half, single) in _PEAKS.items():
        if words.issuperset(name.split()) and dtype in (mx.bfloat16, mx.float32):
            return 1e12 * (half if dtype == mx.bfloat16 else single)
    return None


def measure_flops(dtype: mx.Dtype, size: int = 1024) -> float:
    """Return the FLOP/s of the fastest of some products of matrices (size, size)."""
    import mlx.core as mx

    matrix, seconds = mx.ones((size, size), dtype=dtype), []
    for _ in range(8):
        began = time.perf_counter()
        mx.eval(matrix @ matrix)
        seconds.append(time.perf_counter() - began)
    return 2.0 * size**3 / min(seconds)
