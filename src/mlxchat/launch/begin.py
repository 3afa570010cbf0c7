"""What every rank does before a step: it forgets the last one, and sets its machine as rank 0's configuration says."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlxchat.distributed.team import Team
from mlxchat.ops.cores import share_of_cores
from mlxchat.ops.device import backend, select_device, set_cpu_threads


def begin_step(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> None:
    """Prepare this rank.

    Args:
        team: all ranks.
        request: `step` (its name), `machine` (device, compute_dtype, limits in bytes, blas_threads) and `neighbours`
            (for each rank, how many there are on its machine, itself included).
        arrays: none.
    """
    del arrays
    team.kept.clear()
    if team.group.leads:
        return  # the stage does it
    machine = request["machine"]
    select_device(machine["device"], machine["compute_dtype"])
    for name, setter in (("memory_limit_bytes", mx.set_memory_limit), ("cache_limit_bytes", mx.set_cache_limit)):
        if machine[name] is not None:
            setter(machine[name])
    if machine["wired_limit_bytes"] is not None and backend() == "metal":
        mx.set_wired_limit(machine["wired_limit_bytes"])
    set_cpu_threads(machine["blas_threads"] or share_of_cores(request["neighbours"][team.group.rank]))
    mx.clear_cache()
    print(f"{request['step']}: rank {team.group.rank} of {team.size}", flush=True)
