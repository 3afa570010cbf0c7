"""Predicted time of trainings: FLOPs divided by the speed of an earlier pretraining."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from mlxchat.config.schema import Config
from mlxchat.model.sizes import flops_per_token, sizes_of
from mlxchat.ops.machine import device_kind
from mlxchat.planning.horizon import derive_hyperparameters
from mlxchat.planning.memory import Training, predict_peak
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.reasons import Estimate
from mlxchat.store.manifest import Manifest
from mlxchat.store.store import Store

# Reached by trainings of this project on CPUs; on GPUs an assumption.
_SHARE_OF_PEAK = 0.4
# A day of the slowest machine that is likely: 12 GFLOP/s.
_LONG_FLOPS = 1e15


def estimate_trainings(config: Config, plan: Iterable[PlannedStep], store: Store) -> dict[str, Estimate]:
    """Return step → estimate of pending trainings with a known speed.

    These are pretrainings, and after them in the plan midtrain and sft where `num_iterations` is set.

    The speed is that of the finished pretraining in the store with the nearest FLOPs per token on the same kind of
    device; without one it is `machine.training_flops`. If that is null too, a training that may take a day is
    estimated by a share of this device's peak, measured on a CPU. The bytes are those of weights and moments.
    """
    found: dict[str, Estimate] = {}
    plan = list(plan)
    is_pretrained_here = any(step.stage.name == "pretrain" for step in plan)
    for step in plan:
        config, name = step.config, step.stage.name
        later = getattr(config, name) if name in ("midtrain", "sft") and is_pretrained_here else None
        if step.done or (name != "pretrain" and (later is None or later.num_iterations is None)):
            continue
        sizes = sizes_of(config.model, config.architecture, config.tokenizer.vocab_size)
        derived, per_token = derive_hyperparameters(config, sizes), flops_per_token(sizes)
        reached, source = config.machine.training_flops, "machine.training_flops"
        if made := _find_nearest(store.recent("pretrain"), per_token, device_kind(config.machine.device)):
            reached, source = _speed(made), made["name"]
        tokens = derived.batch_tokens * derived.num_iterations
        if later is not None:
            tokens = (later.batch.tokens or derived.batch_tokens) * later.num_iterations
        flops = per_token * tokens
        if reached is None and flops > _LONG_FLOPS:
            reached, source = _share_of_peak(config), "this device's peak"
        if reached is None:
            continue
        peak = predict_peak(Training(sizes=sizes, optimizer=config.optimizer, rows=1, row_tokens=1), 1)
        moments = peak.moments if (later or config.pretrain).save_training_state else 0
        found[step.name] = Estimate(seconds=flops / reached, bytes=int(peak.weights + moments), artifact=source)
    return found


def _share_of_peak(config: Config) -> float | None:
    from mlxchat.ops.device import select_device
    from mlxchat.planning.peak import peak_flops  # imports MLX

    peak = peak_flops(select_device(config.machine.device, config.machine.compute_dtype))
    return None if peak is None else _SHARE_OF_PEAK * peak


def _find_nearest(made: Iterable[Manifest], per_token: float, device: str) -> Manifest | None:
    known = [each for each in made if _speed(each) and each.get("device", {}).get("backend") == device]
    return min(known, key=lambda each: abs(math.log(each["derived"]["flops_per_token"] / per_token)), default=None)


def _speed(made: Mapping[str, object]) -> float | None:
    """Return the FLOP/s of a finished pretraining; None: not in its manifest."""
    derived, tokens = made.get("derived"), made.get("tokens_per_second")
    per_token = derived.get("flops_per_token") if isinstance(derived, Mapping) else None
    return tokens * per_token if isinstance(tokens, float) and per_token else None
