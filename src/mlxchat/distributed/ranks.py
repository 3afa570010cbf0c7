"""The ranks of a run: started on this machine for the first step that needs them, or by mlx.launch.

In both cases each process has the variables that MLX reads and the same command. Rank 0 runs it; the others connect to
rank 0 and follow it. They connect and compare versions before MLX's `init`, which has no timeout.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import platform
import secrets
import shlex
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxchat.config.verbs import split_verb
from mlxchat.distributed.watch import Follower, Watch, connect, find_facts, how_ended, listen_at
from mlxchat.errors import ConfigError, Interrupted, PeerLost, StepFailed
from mlxchat.ops.machine import share_of_cores

if TYPE_CHECKING:
    import mlx.core as mx

    from mlxchat.config.schema import MachineConfig
    from mlxchat.distributed.group import Group
    from mlxchat.distributed.team import Team

# Secret of the run that ranks present to rank 0. Users may set it for mlx.launch.
TOKEN = "MLXCHAT_RANKS_TOKEN"
# Where rank 0 listens, in ranks that it started.
_ADDRESS = "MLXCHAT_RANKS_ADDRESS"
# All variables of MLX's collectives, and ours; cleared so that child processes do not become ranks.
_VARIABLES = (
    "MLX_RANK", "MLX_HOSTFILE", "MLX_WORLD_SIZE", "MLX_IBV_DEVICES", "MLX_JACCL_COORDINATOR", "MLX_JACCL_RING",
    "NCCL_HOST_IP", "NCCL_PORT", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", _ADDRESS, TOKEN,
)  # fmt: skip
# Options with which `run` only prints.
_PRINTING = {
    "--help", "-h", "--version", "-V", "--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc",
}  # fmt: skip
_START_SECONDS = 90.0
_MEET_SECONDS = 120.0
_WELCOME_SECONDS = 180.0
_JOIN_SECONDS = 60.0
_HERE = "127.0.0.1"

_current: Ranks | None = None
"""The ranks of this process, once connected. A process has at most one group: MLX cannot create a second one."""


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """This rank and the others, according to the environment."""

    rank: int
    size: int
    backend: str
    """ring, jaccl, nccl or mpi."""
    address: tuple[str, int] | None
    """Host and port at which rank 0 listens; None (mpi): sent through MLX's group."""
    hosts: list[str] = field(default_factory=list)
    """Hosts of all ranks, if known."""


def find_meeting(variables: Mapping[str, str] = os.environ) -> Meeting | None:
    """Return the ranks that this process belongs to, or None for a single process.

    Raises:
        ConfigError: the variables contradict each other, or a file that they name cannot be read.
    """
    if "MLX_RANK" not in variables:
        size = _number(variables, "OMPI_COMM_WORLD_SIZE", 1)
        rank = _number(variables, "OMPI_COMM_WORLD_RANK", 0)
        return Meeting(rank=rank, size=size, backend="mpi", address=None) if size > 1 else None
    rank, hosts = _number(variables, "MLX_RANK", 0), list[str]()
    if "MLX_JACCL_COORDINATOR" in variables:
        backend, size = "jaccl", len(_read_json(variables, "MLX_IBV_DEVICES"))
        host, port = _split(variables["MLX_JACCL_COORDINATOR"])
    elif "NCCL_HOST_IP" in variables and "MLX_WORLD_SIZE" in variables:
        backend, size = "nccl", _number(variables, "MLX_WORLD_SIZE", 1)
        host, port = variables["NCCL_HOST_IP"], _number(variables, "NCCL_PORT", 12345)
    elif "MLX_HOSTFILE" in variables:
        found = _read_json(variables, "MLX_HOSTFILE")
        if not all(isinstance(each, list) and each and all(isinstance(one, str) for one in each) for each in found):
            raise ConfigError(
                f"MLX_HOSTFILE: {variables['MLX_HOSTFILE']} is not a hostfile of a ring: expected a list for each rank "
                'with its addresses, such as [["10.0.0.1:5000"], ["10.0.0.2:5000"]]'
            )
        backend, size, hosts = "ring", len(found), [_split(each[0])[0] for each in found]
        host, port = hosts[0] if hosts else "", max((_split(one)[1] for each in found for one in each), default=0)
    else:
        return None
    if size < 2:  # mlx.launch -n 1
        return None
    if not 0 <= rank < size:
        raise ConfigError(f"MLX_RANK is {rank}, expected 0 to {size - 1}: there are {size} ranks")
    # Rank 0 listens one port above those of MLX, unless it set the address.
    address = _split(variables[_ADDRESS]) if _ADDRESS in variables else (host, port + 1)
    return Meeting(rank=rank, size=size, backend=backend, address=address, hosts=hosts)


def _number(variables: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(variables.get(name, default))
    except ValueError:
        raise ConfigError(f"{name} is {variables[name]!r}, expected a whole number") from None


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        raise ConfigError(f'"{port}" is not a port: expected addresses of ranks as HOST:PORT')
    return host, int(port)


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


def forget_meeting() -> None:
    """Clear the variables, so that child processes do not become ranks."""
    for name in _VARIABLES:
        os.environ.pop(name, None)


def enter(arguments: list[str]) -> int | None:
    """Become the rank that the environment names; return its exit code, or None if this process runs the command.

    Raises:
        MlxchatError: the ranks cannot connect, or their versions differ.
    """
    meeting = find_meeting()
    if meeting is None:
        return None
    if not computes(arguments):
        forget_meeting()
        return None if meeting.rank == 0 else 0
    if meeting.rank == 0:
        _meet(meeting)
        return None
    code = follow(meeting)
    sys.stdout.flush()
    os._exit(code)  # MLX's threads may still wait for a lost rank


def computes(arguments: list[str]) -> bool:
    """Return whether all ranks take part in a command line: `run`, or its short form."""
    if split_verb(arguments)[0] != "run" or arguments[:1] == ["help"]:
        return False
    return not _PRINTING & {argument.partition("=")[0] for argument in arguments}


def follow(meeting: Meeting) -> int:
    """Follow rank 0 until it ends; return the exit code."""
    from mlxchat.distributed.team import Team

    facts, token = find_facts(meeting.rank), os.environ.get(TOKEN, "")
    is_child, group, address = _ADDRESS in os.environ, None, meeting.address
    if address is None:
        group, _ = _join(meeting.backend, meeting.rank)
        address = tuple(group.share_json())
    host, port = address
    try:
        line = connect((host, port), 0 if is_child else _MEET_SECONDS)
    except OSError as error:
        print(f"error: rank {meeting.rank} on {facts['host']} cannot connect to rank 0 at {host}:{port} ({error})",
              file=sys.stderr)  # fmt: skip
        return 1
    line.send({"kind": "hello", "facts": facts, "token": token})
    answer = None
    with suppress(OSError, ValueError):
        answer = line.receive(_WELCOME_SECONDS)
    if answer is None:
        line.close()
        return 1  # rank 0 reports why
    if group is None:
        group, _ = _join(meeting.backend, meeting.rank)
    is_here = answer["host"] == facts["host"]
    follower = Follower(line, answer["host"], is_here=is_here, says=meeting.rank == 1 and not is_child)
    if not is_child:
        _divert_errors(Path(os.devnull))
    print(f"rank {meeting.rank} of {meeting.size} on {facts['host']}", flush=True)
    try:
        Team(group).follow(follower.wait)
    except BaseException as error:
        if not isinstance(error, PeerLost):
            traceback.print_exc()
        follower.fail(error)
        return 1
    return 0


def begin_step(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> None:
    """Prepare every rank for a step: `machine`: settings; `neighbours`: per rank, the ranks on its machine."""
    import mlx.core as mx

    from mlxchat.config.schema import MachineConfig
    from mlxchat.ops.device import prepare_machine

    team.kept.clear()
    if team.group.leads:
        return  # the stage prepares rank 0
    machine = MachineConfig(**request["machine"])
    prepare_machine(machine, machine.blas_threads or share_of_cores(request["neighbours"][team.group.rank]))
    mx.clear_cache()


class Ranks:
    """The ranks of a run; this process is rank 0."""

    def __init__(self, machine: MachineConfig | None = None, threads: int | None = None) -> None:
        """`machine`: the run's settings; `threads`: `blas_threads` as the user set it. Starts nothing."""
        self.machine, self.threads = machine, threads
        self.watch: Watch | None = None
        self.team: Team | None = None

    @property
    def size(self) -> int:
        """The number of ranks, started or not."""
        if self.watch is not None:
            return self.watch.size
        return 1 if self.machine is None else self.machine.num_processes

    @property
    def is_broken(self) -> bool:
        """Whether the ranks can no longer compute together."""
        return self.watch is not None and (self.watch.loss is not None or (self.team is not None and self.team.open))

    def start(self, run: Any, work: Path) -> Team:
        """Return the ranks, ready for a step that saves in `work`; the first call starts those of this machine.

        Raises:
            StepFailed: a rank did not start, or was lost before.
            ConfigError: there are fewer GPUs than ranks.
            Interrupted: the run was stopped meanwhile.
        """
        machine = self.machine
        assert machine is not None
        if self.watch is None:
            self._start_here(run, machine)
        watch, team = self.watch, self.team
        assert watch is not None
        assert team is not None
        watch.work = work
        if self.is_broken:
            raise PeerLost(watch.explain())
        watch.on_stop = lambda number: run.stop_signal or (run.request_stop(number), run.announce_stop())
        pids = [facts["pid"] for _, facts in sorted(watch.facts.items())]
        text = json.dumps({**(self.describe() or {}), "pids": pids})
        with suppress(OSError):
            (run.folder / "ranks.json").write_text(text + "\n", encoding="utf-8")
        _divert_errors(run.folder / "rank-0.log")
        names = ("device", "compute_dtype", "memory_limit_bytes", "cache_limit_bytes", "wired_limit_bytes")
        settings = {name: getattr(machine, name) for name in names} | {"blas_threads": self.threads}
        neighbours = [self.on_host_of(rank) for rank in range(self.size)]
        team.call(begin_step, {"machine": settings, "neighbours": neighbours})
        return team

    def describe(self) -> dict[str, Any] | None:
        """Return number, backend and hosts of the ranks, for records; None before they are connected."""
        if self.watch is None or self.team is None:
            return None
        hosts = [facts["host"] for _, facts in sorted(self.watch.facts.items())]
        return {"size": self.size, "backend": self.team.group.backend, "hosts": hosts}

    def kill(self) -> None:
        """End all ranks at once."""
        if self.watch is not None:
            self.watch.leave()

    def on_host_of(self, rank: int) -> int:
        """Return the number of ranks on the machine of `rank`."""
        assert self.watch is not None
        host = self.watch.facts[rank]["host"]
        return sum(facts["host"] == host for facts in self.watch.facts.values())

    def _start_here(self, run: Any, machine: MachineConfig) -> None:
        """Start the other ranks on this machine, and connect all."""
        import mlx.core as mx

        size = self.size
        on_gpus = machine.device != "cpu" and mx.distributed.is_available("nccl")  # only in MLX for CUDA
        gpus = mx.device_count(mx.gpu) if on_gpus else 0
        kind = "nccl" if gpus else "ring"
        if 0 < gpus < size:
            raise ConfigError(f"machine.num_processes is {size}, but MLX finds {gpus} GPUs: use at most one per GPU")
        forget_meeting()  # variables that another launcher left
        ports, token = _free_ports(size), secrets.token_hex(16)
        watch = Watch(find_facts(0), size, token)
        with listen_at(_HERE, 0) as listener, tempfile.NamedTemporaryFile("w", suffix=".json") as hosts:
            json.dump([[f"{_HERE}:{port}"] for port in ports], hosts)
            hosts.flush()
            variables = {"MLX_HOSTFILE": hosts.name}
            if kind == "nccl":
                variables = {"NCCL_HOST_IP": _HERE, "NCCL_PORT": str(ports[0]), "MLX_WORLD_SIZE": str(size)}
            variables |= {_ADDRESS: f"{_HERE}:{listener.getsockname()[1]}", TOKEN: token}
            try:
                for rank in range(1, size):
                    watch.children[rank] = _spawn(rank, variables, run.folder, machine.blas_threads or 1, kind)
                watch.gather(listener, _START_SECONDS, lambda: _check_start(run, watch), [])
                os.environ.update(variables | {"MLX_RANK": "0"})
                self._lead(watch, *_join(kind, 0))
            except BaseException:
                watch.leave()
                raise
        run.say(f"{size} ranks compute together ({kind}); output of the others: {run.folder.name}/rank-1.log, …")

    def _lead(self, watch: Watch, group: Group, handles: list[int]) -> None:
        """Start watching the other ranks of MLX's group."""
        global _current
        from mlxchat.distributed.team import Team

        watch.on_loss = lambda: _shut(handles)
        watch.begin()
        self.watch = watch
        self.team = team = Team(replace(group, explain=watch.explain), watch.wake)
        watch.is_calling = lambda: team.open
        _current = self
        atexit.register(self._end, watch)

    def _end(self, watch: Watch) -> None:
        """End the other ranks, and kill those of this machine that do not end."""
        global _current
        _current = None
        (watch.leave if self.is_broken else watch.end)()


def current() -> Ranks | None:
    """Return the connected ranks that this process leads, or None."""
    return _current


def lead_ranks(machine: MachineConfig) -> tuple[MachineConfig, Ranks | None]:
    """Return the machine's settings with its cores divided among ranks, and the ranks; None for a single process.

    Raises:
        ConfigError: the settings contradict ranks that are already connected.
    """
    ranks = current()
    if ranks is None and machine.num_processes == 1:
        return machine, None
    if ranks is not None and machine.max_parallel_steps > 1:
        raise ConfigError(
            f"machine.max_parallel_steps is {machine.max_parallel_steps}, but several ranks compute one step at a "
            "time: leave it out"
        )
    if ranks is not None and machine.num_processes not in (1, ranks.size):
        raise ConfigError(
            f"machine.num_processes is {machine.num_processes}, but there are {ranks.size} ranks already: leave it out"
        )
    neighbours = ranks.on_host_of(0) if ranks is not None else machine.num_processes
    shared = replace(machine, blas_threads=machine.blas_threads or share_of_cores(neighbours))
    if ranks is None:
        return shared, Ranks(shared, machine.blas_threads)
    ranks.machine, ranks.threads = shared, machine.blas_threads
    return shared, ranks


def _meet(meeting: Meeting) -> None:
    """Connect ranks that a launcher started; this process is rank 0.

    Raises:
        ConfigError: their versions differ, or this machine does not have the address of rank 0.
        StepFailed: one did not connect.
    """
    watch = Watch(find_facts(0), meeting.size, os.environ.get(TOKEN, ""))
    joined = None if meeting.address is not None else _join(meeting.backend, 0)
    host, port = meeting.address or ("", 0)
    try:
        listener = listen_at(host, port)
    except OSError as error:
        raise ConfigError(
            f"rank 0 on {platform.node()} cannot listen at {host}:{port} ({error.strerror or error}). It listens one "
            "port above those of the hostfile: check that this is the host of rank 0 and that the port is free"
        ) from None
    with listener:
        if joined is not None:
            joined[0].share_json([platform.node(), listener.getsockname()[1]])
        watch.gather(listener, _MEET_SECONDS, lambda: None, meeting.hosts)
    Ranks()._lead(watch, *(joined or _join(meeting.backend, 0)))
    places = ", ".join(dict.fromkeys(str(facts["host"]) for facts in watch.facts.values()))
    print(f"{meeting.size} ranks compute together ({meeting.backend}): {places}", flush=True)


def _spawn(rank: int, variables: dict[str, str], folder: Path, threads: int, kind: str) -> subprocess.Popen[bytes]:
    """Start a rank in a new session, so that Ctrl-C in the terminal reaches only rank 0."""
    own = {"MLX_RANK": str(rank), "OPENBLAS_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if kind == "nccl":
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        own["CUDA_VISIBLE_DEVICES"] = visible[rank] if visible else str(rank)
    with (folder / f"rank-{rank}.log").open("ab") as log:
        try:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "mlxchat", "run"], env=os.environ | variables | own,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise StepFailed(f"rank {rank} could not be started: {error}") from error


def _check_start(run: Any, watch: Watch) -> None:
    """Raise if the run was stopped, or a rank ended during the start."""
    if run.stop_signal is not None:
        raise Interrupted("stopped before its ranks were connected. The same command continues.", run.stop_signal)
    for rank, child in watch.children.items():
        if child.poll() is not None:
            log, tail = run.folder / f"rank-{rank}.log", list[str]()
            with suppress(OSError):
                tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
            raise StepFailed(
                "\n".join([f"rank {rank} could not be started: it {how_ended(child.returncode)} ({log})", *tail])
            )


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((_HERE, 0))
        return [each.getsockname()[1] for each in sockets]


def _join(backend: str, rank: int) -> tuple[Group, list[int]]:
    """Return MLX's group, and the file descriptors of the sockets that MLX opened.

    Raises:
        StepFailed: MLX could not connect the ranks.
    """
    import mlx.core as mx

    from mlxchat.distributed.group import Group

    before = _sockets()
    message = (
        "error: the ranks of this run reached rank 0, but MLX did not connect them within "
        f"{_JOIN_SECONDS:g} seconds.\n       Check that all hosts reach each other at the addresses of the hostfile.\n"
    )
    try:
        with _ending_after(_JOIN_SECONDS, message if rank == 0 else ""):
            raw = mx.distributed.init(strict=True, backend=backend)
    except RuntimeError as error:
        raise StepFailed(f"MLX could not connect the ranks by {backend}: {error}") from error
    finally:
        forget_meeting()
    return Group(raw, backend), sorted(_sockets() - before)


def _sockets() -> set[int]:
    found = set()
    for handle in range(3, 1024):
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(handle).st_mode):
                found.add(handle)
    return found


def _shut(handles: list[int]) -> None:
    """Shut down sockets in which MLX waits, so that it raises."""
    for handle in handles:
        with suppress(OSError), socket.socket(fileno=os.dup(handle)) as connection:
            connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def _ending_after(seconds: float, message: str) -> Iterator[None]:
    """End this process with a message if the body takes longer, or at a signal.

    MLX's `init` holds the GIL, so no Python thread or signal handler runs meanwhile. Therefore faulthandler's C timer
    writes to a shell, which prints the message.
    """
    script = f"read line && printf %s {shlex.quote(message)} >&2"
    shell = subprocess.Popen(["/bin/sh", "-c", script], stdin=subprocess.PIPE, start_new_session=True)
    assert shell.stdin is not None
    former: dict[signal.Signals, Any] = {}
    with suppress(ValueError):  # not in the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            former[number] = signal.signal(number, signal.SIG_DFL)
    faulthandler.dump_traceback_later(seconds, exit=True, file=shell.stdin)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        for known, handler in former.items():
            signal.signal(known, handler)
        shell.communicate()


def _divert_errors(path: Path) -> None:
    """Redirect standard error of C++ code, such as MLX's lines about a lost rank, to a file.

    Python's own stream stays on the terminal. MLX_RING_VERBOSE disables this.
    """
    if os.environ.get("MLX_RING_VERBOSE"):
        return
    stream, is_own = sys.stderr, sys.stderr is sys.__stderr__
    stream.flush()
    if is_own:  # else the stream was replaced and does not use this descriptor
        sys.stderr = os.fdopen(os.dup(2), "w", encoding=stream.encoding, errors=stream.errors, buffering=1)
    with suppress(OSError), path.open("ab") as log:
        os.dup2(log.fileno(), 2)
