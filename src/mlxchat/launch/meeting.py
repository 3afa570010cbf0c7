"""How the ranks of a run that somebody else started find each other: mlx.launch, mpirun, or variables set by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxchat.errors import ConfigError

# Every variable that MLX's collectives read; whoever has taken them clears them for the processes it starts.
VARIABLES = (
    "MLX_RANK", "MLX_HOSTFILE", "MLX_WORLD_SIZE", "MLX_IBV_DEVICES", "MLX_JACCL_COORDINATOR", "MLX_JACCL_RING",
    "NCCL_HOST_IP", "NCCL_PORT", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK",
)  # fmt: skip
# A word that only ranks of this run know; whoever starts them may give one.
TOKEN = "MLXCHAT_RANKS_TOKEN"


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """One rank's knowledge of the others."""

    rank: int
    size: int
    backend: str
    """ring, jaccl, nccl or mpi."""
    address: tuple[str, int] | None
    """Host and port at which rank 0 listens to the others; None (mpi): it tells them through the group."""
    hosts: list[str] = field(default_factory=list)
    """Where each rank is, as far as the variables say so."""


def find_meeting(variables: Mapping[str, str] = os.environ) -> Meeting | None:
    """Return the ranks that this process belongs to, or None if it was started alone.

    Raises:
        ConfigError: the variables contradict each other, or what they name cannot be read.
    """
    if "MLX_RANK" not in variables:
        size = _number(variables, "OMPI_COMM_WORLD_SIZE", 1)
        rank = _number(variables, "OMPI_COMM_WORLD_RANK", 0)
        return Meeting(rank=rank, size=size, backend="mpi", address=None) if size > 1 else None
    rank, address = _number(variables, "MLX_RANK", 0), ("", 0)
    if "MLX_JACCL_COORDINATOR" in variables:
        devices = _read_json(variables, "MLX_IBV_DEVICES")
        host, _, text = variables["MLX_JACCL_COORDINATOR"].rpartition(":")
        found = Meeting(rank=rank, size=len(devices), backend="jaccl", address=(host, _port(text) + 1))
    elif "NCCL_HOST_IP" in variables and "MLX_WORLD_SIZE" in variables:
        address = (variables["NCCL_HOST_IP"], _number(variables, "NCCL_PORT", 12345) + 1)
        found = Meeting(rank=rank, size=_number(variables, "MLX_WORLD_SIZE", 1), backend="nccl", address=address)
    elif "MLX_HOSTFILE" in variables:
        addresses = _read_json(variables, "MLX_HOSTFILE")
        if not all(isinstance(each, list) and each and all(isinstance(one, str) for one in each) for each in addresses):
            raise ConfigError(
                f"MLX_HOSTFILE: {variables['MLX_HOSTFILE']} is no ring's hostfile: expected a list for each rank with "
                'its addresses, such as [["10.0.0.1:5000"], ["10.0.0.2:5000"]]'
            )
        hosts = [each[0].rpartition(":")[0] for each in addresses]
        # The first port that is surely none of the ring's own.
        port = max((_port(one.rpartition(":")[2]) for each in addresses for one in each), default=0) + 1
        address = (hosts[0] if hosts else "", port)
        found = Meeting(rank=rank, size=len(addresses), backend="ring", address=address, hosts=hosts)
    else:
        return None
    if found.size < 2:  # what mlx.launch -n 1 sets
        return None
    if not 0 <= found.rank < found.size:
        raise ConfigError(f"MLX_RANK is {found.rank}, expected 0 to {found.size - 1}: there are {found.size} ranks")
    return found


def take_token() -> str:
    """Return the word by which this run's ranks know each other, empty if there is none, and clear it."""
    return os.environ.pop(TOKEN, "")


def forget_meeting() -> None:
    """Clear the variables, so that no process that this one starts takes itself for a rank."""
    for name in VARIABLES:
        os.environ.pop(name, None)


def _number(variables: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(variables.get(name, default))
    except ValueError:
        raise ConfigError(f"{name} is {variables[name]!r}, expected a whole number") from None


def _port(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f'"{text}" is no port: addresses of ranks are HOST:PORT') from None


def _read_json(variables: Mapping[str, str], name: str) -> list[Any]:
    path = Path(variables.get(name, ""))
    try:
        text = path.read_text(encoding="utf-8").strip()
        found = json.loads(text) if text else []
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: {path} cannot be read as JSON ({error})") from None
    if not isinstance(found, list):
        raise ConfigError(f"{name}: {path} does not hold a list")
    return found
