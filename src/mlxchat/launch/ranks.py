"""The ranks of this process's runs, which rank 0 leads: started here when a step needs them, or there already.

A process has one group for its whole life, since MLX makes no second one.
"""

from __future__ import annotations

import atexit
import json
import os
import platform
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxchat.errors import ConfigError, StepFailed
from mlxchat.launch.line import listen_at
from mlxchat.launch.meeting import TOKEN, Meeting, take_token

if TYPE_CHECKING:
    from mlxchat.distributed.group import Group
    from mlxchat.distributed.team import Team
    from mlxchat.launch.watch import Watch

_START_SECONDS = 90.0
_MEET_SECONDS = 120.0
_END_SECONDS = 5.0
_LOG_LINES = 5
_HERE = "127.0.0.1"

_current: Ranks | None = None
"""The ranks of this process, once they are there."""


class Ranks:
    """All ranks, this process being the first."""

    def __init__(self, watch: Watch, backend: str) -> None:
        """Take the other ranks, which `gather` has found."""
        self.watch, self.backend = watch, backend
        self.team: Team | None = None
        self.folder: Path | None = None
        """Where their output goes: that of the run."""

    @property
    def size(self) -> int:
        """Return how many ranks there are, this one included."""
        return self.watch.size

    def join(
        self, variables: dict[str, str], others: dict[str, str], hosts: list[list[str]] | None,
        joined: tuple[Group, list[int]] | None = None,
    ) -> None:  # fmt: skip
        """Join MLX's group together with the others, and listen to them from now on.

        Args:
            variables: what MLX reads in this process.
            others: what it reads in the others.
            hosts: addresses of each rank, for a ring of this machine.
            joined: the group and its sockets, if all have joined it already.
        """
        from mlxchat.distributed.team import Team
        from mlxchat.launch.joining import join_group, shut
        from mlxchat.launch.noise import divert_noise

        self.watch.welcome({"variables": others, "hosts": hosts, "host": platform.node()})
        try:
            group, sockets = joined or join_group(self.backend, variables, hosts, tell=True)
        except StepFailed:
            self.watch.leave()
            raise
        divert_noise(lambda line: self._keep(0, line))
        self.watch.on_loss = lambda: shut(sockets)
        self.watch.on_output = self._keep
        self.watch.begin()
        self.team = team = Team(group, self.watch)
        self.watch.is_calling = lambda: team.open
        atexit.register(self.end)

    @property
    def is_broken(self) -> bool:
        """Tell whether nothing more can be computed together."""
        return self.watch.loss is not None or self.team is None or self.team.open

    def explain(self, error: BaseException, work: Path) -> BaseException:
        """Return what is told of an error that ended a step: which rank was lost, if that is what it comes from.

        Args:
            error: what was raised.
            work: the step's folder of saved states.
        """
        if not _is_loss(error):
            return error
        loss = self.watch.cause() or f"the connection between the ranks broke ({error})"
        saved = _last_save(work)
        where = f"iteration {saved}" if saved is not None else "what was saved last"
        told = StepFailed(f"{loss}. All ranks have ended. The same command continues from {where}.")
        told.__cause__ = error
        return told

    def end(self) -> None:
        """Let the other ranks go, and see that those of this machine are gone."""
        global _current
        _current = None if _current is self else _current
        if self.team is None or self.is_broken:
            self.watch.kill()
            return
        self.watch.finish()
        self.team.end()
        for child in self.watch.children.values():
            with suppress(subprocess.TimeoutExpired):
                child.wait(_END_SECONDS)
        self.watch.leave()

    def describe(self) -> dict[str, Any]:
        """Return number, backend and hosts of the ranks, for records."""
        hosts = [facts["host"] for _, facts in sorted(self.watch.facts.items())]
        return {"size": self.size, "backend": self.backend, "hosts": hosts}

    def write(self, folder: Path) -> None:
        """Say in a run's folder who computes, for whoever looks while it does."""
        self.folder = folder
        pids = [facts["pid"] for _, facts in sorted(self.watch.facts.items())]
        with suppress(OSError):
            (folder / "ranks.json").write_text(json.dumps(self.describe() | {"pids": pids}) + "\n", encoding="utf-8")

    def on_host_of(self, rank: int) -> int:
        """Return how many ranks share the machine of this one."""
        host = self.watch.facts[rank]["host"]
        return sum(facts["host"] == host for facts in self.watch.facts.values())

    def _keep(self, rank: int, text: str) -> None:
        if self.folder is not None:
            with suppress(OSError), (self.folder / f"rank-{rank}.log").open("a", encoding="utf-8") as file:
                file.write(text + "\n")


def current() -> Ranks | None:
    """Return the ranks that this process leads, if they are there."""
    return _current


def start_here(
    size: int, folder: Path, blas_threads: int, device: str, say: Callable[[str], None], check: Callable[[], None]
) -> Ranks:
    """Start further ranks on this machine, and return all of them.

    Args:
        size: ranks, this process included.
        folder: where the output of the others goes.
        blas_threads: cores of each, which it may not exceed while it starts.
        device: `machine.device`.
        say: tells people.
        check: called while they start; it may raise.

    Raises:
        StepFailed: one could not be started.
        ConfigError: there are fewer GPUs than ranks.
    """
    global _current
    import mlx.core as mx

    from mlxchat.launch.facts import find_facts
    from mlxchat.launch.watch import Watch
    from mlxchat.ops.device import backend

    on_gpus = device != "cpu" and backend() == "cuda"
    kind = "nccl" if on_gpus and mx.distributed.is_available("nccl") else "ring"
    if kind == "nccl" and mx.device_count(mx.gpu) < size:
        found_gpus = mx.device_count(mx.gpu)
        raise ConfigError(f"machine.num_processes is {size}, but MLX finds {found_gpus} GPUs: expected one for each")
    token = secrets.token_hex(16)
    watch = Watch(find_facts(0), size, token)
    found = Ranks(watch, kind)
    found.folder = folder
    with listen_at(_HERE, 0) as listener:
        try:
            for rank in range(1, size):
                order = {"address": listener.getsockname()[:2], "rank": rank, "size": size, "backend": kind}
                watch.children[rank] = _start(order, token, folder, blas_threads, kind)
            watch.gather(listener, _START_SECONDS, lambda: _check_children(watch, folder, check), [_HERE] * size)
        except BaseException:
            watch.leave()
            raise
    ports = _free_ports(size)
    if kind == "ring":
        found.join({"MLX_RANK": "0"}, {}, [[f"{_HERE}:{port}"] for port in ports])
    else:
        variables = {"NCCL_HOST_IP": _HERE, "NCCL_PORT": str(ports[0]), "MLX_WORLD_SIZE": str(size)}
        found.join({"MLX_RANK": "0", **variables}, variables, None)
    say(f"{size} ranks compute together ({kind}): {folder.name}/rank-1.log has what the others print")
    _current = found
    return found


def meet(meeting: Meeting, say: Callable[[str], None]) -> Ranks:
    """Wait for the ranks that somebody else started, this process being the first, and return all of them.

    Raises:
        ConfigError: they do not run the same, or this machine does not have the address of rank 0.
        StepFailed: one did not come.
    """
    global _current
    from mlxchat.launch.facts import find_facts
    from mlxchat.launch.joining import join_group
    from mlxchat.launch.watch import Watch

    watch = Watch(find_facts(0), meeting.size, take_token())
    found = Ranks(watch, meeting.backend)
    joined = None if meeting.address is not None else join_group(meeting.backend, {}, None, tell=True)
    host, port = meeting.address or ("", 0)
    try:
        listener = listen_at(host, port)
    except OSError as error:
        raise ConfigError(
            f"rank 0 on {platform.node()} cannot listen at {host}:{port} ({error.strerror or error}). It listens one "
            "port above those of the hostfile: is this the host of rank 0, and is the port free?"
        ) from None
    with listener:
        if joined is not None:
            joined[0].share_json([platform.node(), listener.getsockname()[1]])
        watch.gather(listener, _MEET_SECONDS, lambda: None, meeting.hosts)
    found.join({}, {}, None, joined)
    places = ", ".join(dict.fromkeys(str(facts["host"]) for facts in watch.facts.values()))
    say(f"{meeting.size} ranks compute together ({meeting.backend}): {places}")
    _current = found
    return found


def _start(order: dict[str, Any], token: str, folder: Path, blas_threads: int, kind: str) -> subprocess.Popen[bytes]:
    """Start one rank, in a session of its own: a Ctrl-C of the terminal is for rank 0 alone."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": str(blas_threads), "PYTHONUNBUFFERED": "1", TOKEN: token}
    if kind == "nccl":
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        environment["CUDA_VISIBLE_DEVICES"] = visible[order["rank"]] if visible else str(order["rank"])
    with (folder / f"rank-{order['rank']}.log").open("ab") as log:
        try:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "mlxchat.launch.follow", json.dumps(order)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise StepFailed(f"rank {order['rank']} could not be started: {error}") from error


def _check_children(watch: Watch, folder: Path, check: Callable[[], None]) -> None:
    from mlxchat.launch.watch import how_ended

    check()
    for rank, child in watch.children.items():
        if child.poll() is not None:
            log = folder / f"rank-{rank}.log"
            with suppress(OSError):
                tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
            raise StepFailed(
                "\n".join([f"rank {rank} could not be started: it {how_ended(child.returncode)} ({log})", *tail])
            )


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((_HERE, 0))
        return [each.getsockname()[1] for each in sockets]


def _is_loss(error: BaseException) -> bool:
    """Tell whether an error comes from a rank that is gone."""
    from mlxchat.distributed.group import PeerLost

    link: BaseException | None = error
    while link is not None:
        if isinstance(link, PeerLost) or (isinstance(link, RuntimeError) and str(link).startswith("[ring]")):
            return True
        link = link.__cause__ or link.__context__
    return False


def _last_save(work: Path) -> int | None:
    """Return the iteration of the newest saved state."""
    with suppress(OSError):
        found = [int(path.name) for path in work.iterdir() if re.fullmatch(r"\d{8}", path.name)]
        return max(found, default=None)
    return None
