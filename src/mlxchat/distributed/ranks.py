"""The ranks that `mlx.launch -n N mlxchat …` starts: every process has the same command line, and rank 0 runs it.

The others follow rank 0 (`Team.follow`) until it ends. mlx.launch ends all ranks when one fails.
"""

from __future__ import annotations

import atexit
import os
import platform
import signal
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxchat.errors import ConfigError, PeerLost, StepFailed

if TYPE_CHECKING:
    import mlx.core as mx

    from mlxchat.config.schema import MachineConfig
    from mlxchat.distributed.team import Team

# Variable that a launcher sets for a backend of MLX → the backend.
_BACKENDS = {
    "MLX_JACCL_COORDINATOR": "jaccl", "MLX_WORLD_SIZE": "nccl", "MLX_HOSTFILE": "ring", "OMPI_COMM_WORLD_SIZE": "mpi",
}  # fmt: skip
# All of them, cleared so that child processes do not become ranks.
_VARIABLES = (
    *_BACKENDS, "MLX_RANK", "MLX_IBV_DEVICES", "MLX_JACCL_RING", "NCCL_HOST_IP", "NCCL_PORT", "OMPI_COMM_WORLD_RANK",
)  # fmt: skip

_team: Team | None = None


def current_team() -> Team | None:
    """Return the ranks that this process leads; None for a single process."""
    return _team


def is_launched() -> bool:
    """Return whether a launcher started this process as one of several ranks."""
    hostfile = os.environ.get("MLX_HOSTFILE")
    if hostfile is not None and not Path(hostfile).read_text(encoding="utf-8").strip():
        return False  # mlx.launch -n 1
    return any(name in os.environ for name in _BACKENDS)


def join_ranks() -> int | None:
    """Join the other ranks. On rank 0 return None; on the others follow rank 0 and return the exit code.

    ConfigError: the ranks differ in what they must have in common; raised on rank 0.
    """
    import mlx.core as mx

    from mlxchat.distributed.team import Group, Team

    global _team
    backend = next(backend for name, backend in _BACKENDS.items() if name in os.environ)
    try:
        group = Group(mx.distributed.init(strict=True, backend=backend), backend)
    except (RuntimeError, ValueError) as error:
        raise StepFailed(f"MLX could not connect the ranks by {backend}: {error}") from error
    for name in _VARIABLES:
        os.environ.pop(name, None)
    facts = group.gather_json(_describe_rank())
    differences = list(_compare(facts))
    if differences and group.leads:
        raise ConfigError("\n".join(differences))
    if differences:
        return 2
    hosts = [each["host"] for each in facts]
    own = facts[group.rank]
    mates = [rank for rank, each in enumerate(facts) if (each["host"], each["cores"]) == (own["host"], own["cores"])]
    if len(mates) > 1 and hasattr(os, "sched_setaffinity"):  # equal shares of the cores; a Mac has no affinity
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, len(cores) // len(mates))
        first = mates.index(group.rank) * share % len(cores)
        os.sched_setaffinity(0, cores[first : first + share])
    team = Team(group, hosts)
    if group.leads:
        _team = team
        atexit.register(_dismiss, team)
        print(f"{team.size} ranks compute together ({backend}): {', '.join(dict.fromkeys(hosts))}", flush=True)
        return None
    for number in (signal.SIGINT, signal.SIGHUP):  # Ctrl-C reaches all ranks: rank 0 saves, which needs the others
        signal.signal(number, signal.SIG_IGN)
    try:
        team.follow()
    except PeerLost:
        return 1  # rank 0, or the rank that failed, says why
    return 0


def begin_step(team: Team, machine: MachineConfig) -> None:
    """Prepare the other ranks for a step; the stage prepares rank 0."""
    team.call(_begin_step, asdict(machine))


def _begin_step(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> None:
    import mlx.core as mx

    from mlxchat.config.schema import MachineConfig
    from mlxchat.ops.device import prepare_machine

    team.kept.clear()
    if not team.group.leads:
        prepare_machine(MachineConfig(**request))
        mx.clear_cache()


def _dismiss(team: Team) -> None:
    """End the other ranks; those of a broken team end because this process does."""
    if not team.is_broken:
        team.group.share_json(None)


def _describe_rank() -> dict[str, Any]:
    """Return this rank's host, cores, versions and backend (cpu, metal or cuda)."""
    from mlxchat import __version__
    from mlxchat.ops.device import backend

    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    versions = {"mlxchat": __version__, "MLX": version("mlx"), "backend": backend()}
    return {"host": platform.node(), "cores": cores, **versions}


def _compare(facts: list[dict[str, Any]]) -> list[str]:
    """Return a line for each rank that cannot work with rank 0."""
    found = []
    for rank, each in enumerate(facts):
        for name in ("mlxchat", "MLX", "backend"):
            if each[name] != facts[0][name]:
                first = f"rank 0 on {facts[0]['host']} has {facts[0][name]}"
                found.append(f"rank {rank} on {each['host']} has {name} {each[name]}, {first}: all ranks need the same")
    return found
