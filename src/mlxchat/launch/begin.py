"""What every rank does before a step: it forgets the last one, and sets its machine as rank 0's configuration says."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlxchat.config import MachineConfig
from mlxchat.distributed.team import Team
from mlxchat.ops.device import prepare_machine
from mlxchat.ops.machine import share_of_cores


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
    machine = MachineConfig(**request["machine"])
    prepare_machine(machine, machine.blas_threads or share_of_cores(request["neighbours"][team.group.rank]))
    mx.clear_cache()
    print(f"{request['step']}: rank {team.group.rank} of {team.size}", flush=True)
