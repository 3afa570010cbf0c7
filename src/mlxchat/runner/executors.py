"""Jobs on other machines: SLURM's queue through submitit, or a Ray cluster.

A job is a pickled call that runs in another process with access to the same files. Its record, a file of
`outputs/jobs`, has a line for its submission, for each start and for its result. So a later command finds the job,
awaits it and takes its result. When SLURM stops a job because of its time limit or preemption, the job saves its state
and is queued again.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from mlxchat.config.schema import ExecutorConfig
from mlxchat.errors import ConfigError, StepFailed
from mlxchat.runner.process import is_stopping
from mlxchat.store.files import Record, Records, now
from mlxchat.store.locks import host_name

Leave = Callable[[], str]
"""Returns the job to its queue and does not return, or returns why it cannot."""
Call = Callable[[Leave | None], Any]
"""The work of a job, whose result is JSON; its argument is None outside of a job."""

_LIBRARIES = {"slurm": "submitit", "submitit_local": "submitit", "ray": "ray"}
_NAMES = {"slurm": "SLURM job", "submitit_local": "submitit job", "ray": "Ray task"}
# Once MLX is loaded, these are set for its compiler; child processes need the former values.
AS_STARTED = {name: os.environ.get(name) for name in ("PATH", "TMPDIR")}
# At most so often the cluster is asked about the jobs of this process.
_ASK_SECONDS = 10.0
# A file server may show a result this long after its job has ended.
_LATE_SECONDS = 3.0
_WATCH_SECONDS = 1.0
_OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
}  # fmt: skip


class LostJob(StepFailed):
    """A job ended without a result: killed, cancelled, or its machine was lost."""


@dataclass(frozen=True)
class Task:
    """What is submitted."""

    name: str
    call: Call
    """Picklable."""
    record: Path
    """File of `outputs/jobs` for the job's record."""


@dataclass(frozen=True)
class State:
    """What the cluster says about a job; without any value: nothing known, or it runs."""

    is_over: bool = False
    waits: bool = False
    why: str = ""
    """SLURM's state or reason."""


class Job:
    """A submitted call. Any process that sees its record can use it."""

    def __init__(self, path: Path) -> None:
        """Read its record."""
        self.path, self._over_since, self._told = path, 0.0, ""
        self._lines = Records(path).read()
        self.facts: Record = next((line for line in reversed(self._lines) if "id" in line), {"kind": "", "id": ""})
        self.name = f"{_NAMES.get(self.facts['kind'], 'job')} {self.facts['id']}"

    def lines(self, key: str) -> list[Record]:
        """Return the lines of its record, as last read, that have a key: started, result or error."""
        return [line for line in self._lines if key in line and line["job"] == self.facts.get("job")]

    def state(self) -> State:
        """Return what the cluster says about it."""
        cluster = _CLUSTERS.get(self.facts["kind"])
        return State(is_over=True) if cluster is None else cluster.look(self.facts)

    @property
    def waits(self) -> bool:
        """Whether it waits in the queue, for its first or another start."""
        return self.state().waits or not self.lines("started")

    def done(self) -> bool:
        """Read its record again; return True if it has ended in any way."""
        self._lines = Records(self.path).read()
        if self.lines("result"):
            return True
        if not self.state().is_over:
            self._over_since = 0.0
            return False
        self._over_since = self._over_since or time.monotonic()
        return time.monotonic() - self._over_since > _LATE_SECONDS

    def result(self) -> Any:
        """Return the result of the call of a finished job, and remove its record.

        Raises:
            LostJob: there is no result.
        """
        results, errors = self.lines("result"), self.lines("error")
        how = errors[-1]["error"] if errors else self.state().why or "its process ended"
        self.path.unlink(missing_ok=True)
        if not results:
            log = f" Its log: {self.facts['log']}" if self.facts.get("log") else ""
            raise LostJob(f"{self.name} was lost ({how}).{log}")
        return results[-1]["result"]

    def describe(self) -> str:
        """Return its state in words: is queued, runs on a host, or has ended."""
        state, starts = self.state(), self.lines("started")
        why = f" ({state.why})" if state.why else ""
        if self.lines("result") or state.is_over:
            return f"has ended{why}"
        if self.waits:
            return f"is queued{' again' if starts else ''}{why}"
        return f"runs on {starts[-1]['host']}"

    def news(self) -> str:
        """Return `describe` if it has changed since the last call, else an empty text."""
        told, self._told = self._told, self.describe()
        return self._told if told != self._told else ""

    @property
    def outlives(self) -> bool:
        """Whether it continues if this process ends: a Ray that this process started ends with it."""
        return self.facts["kind"] != "ray" or self.facts["address"] is not None

    def cancel(self) -> None:
        """Remove it from the queue, or let it save and end."""
        with suppress(Exception):  # the cluster may be gone
            _CLUSTERS[self.facts["kind"]].cancel(self.facts, self.path)


def attach(path: Path) -> Job | None:
    """Return the job of a record if it is queued or runs."""
    job = Job(path)
    return None if job.lines("result") or job.state().is_over else job


def check_installed(settings: ExecutorConfig) -> None:
    """Refuse an executor whose library is missing.

    Raises:
        ConfigError: names the command to install it.
    """
    library = _LIBRARIES.get(settings.kind)
    if library is not None and find_spec(library) is None:
        raise ConfigError(f"executor={settings.kind} needs {library}: pip install 'mlxchat[{library}]'")


def submit(settings: ExecutorConfig, name: str, tasks: Sequence[Task], folder: Path, **facts: str) -> list[Job]:
    """Submit tasks, several to SLURM as one job array, and return their jobs.

    Args:
        settings: the executor and its resources.
        name: name in SLURM's queue.
        tasks: what to submit.
        folder: folder for submitit's inputs and logs, on a file system that all machines share.
        facts: for the records of the jobs.

    Raises:
        ConfigError: they cannot be submitted here.
    """
    here = [_Here(task.call, Path.cwd(), task.record.resolve(), os.urandom(4).hex(), settings.kind) for task in tasks]
    cluster = _CLUSTERS[settings.kind]
    try:
        with environment(AS_STARTED):
            found = cluster.submit(settings, name, [task.name for task in tasks], here, folder)
    except Exception as error:  # of many kinds: the cluster refuses, or cannot be reached
        raise ConfigError(f"executor={settings.kind}: {(str(error).splitlines() or ['?'])[0]}") from None
    shared: Record = {"kind": settings.kind, "submitted": now(), "host": host_name(), **facts}
    shared["address"] = settings.address or os.environ.get("RAY_ADDRESS")
    for task, call, known in zip(tasks, here, found, strict=True):
        Records(task.record).append({"job": call.job, "name": task.name, **shared, **known})
    return [Job(task.record) for task in tasks]


@dataclass(frozen=True)
class _Here:
    """A call that runs in the working directory of the submitting process, and records its starts and its result."""

    call: Call
    cwd: Path
    record: Path
    job: str
    """Distinguishes it from other jobs with this record."""
    kind: str

    def __call__(self) -> None:
        """Run the call inside its job."""
        os.chdir(self.cwd)
        record = Records(self.record)
        record.append({"job": self.job, "started": now(), "host": host_name(), "pid": os.getpid()})
        try:
            with self._watching() if self.kind == "ray" else queue_signals() as leave:
                result = self.call(leave)
        except Exception as error:
            record.append({"job": self.job, "error": f"{type(error).__name__}: {error}"})
            raise
        record.append({"job": self.job, "result": result})

    def checkpoint(self) -> Any:
        """Return what submitit queues at the time limit: the call as it was submitted, without traces of this start."""
        from submitit import JobEnvironment
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission.load(JobEnvironment().paths.submitted_pickle)

    @contextmanager
    def _watching(self) -> Iterator[Leave]:
        """Stop the run when its record requests it: Ray only kills. Otherwise Ray starts a stopped task again."""
        ended, cancelled = threading.Event(), threading.Event()

        def watch() -> None:
            while not ended.wait(_WATCH_SECONDS):
                if any(line.get("cancel") == self.job for line in Records(self.record).read()):
                    cancelled.set()
                    os.kill(os.getpid(), signal.SIGTERM)
                    return

        def leave() -> str:
            if not cancelled.is_set():
                os._exit(128 + signal.SIGTERM)
            return "it was cancelled"

        threading.Thread(target=watch, name="cancel", daemon=True).start()
        try:
            yield leave
        finally:
            ended.set()


class _Slurm:
    """SLURM, through submitit for scripts and requeueing, and squeue, which needs no accounting, for states."""

    def __init__(self) -> None:
        self._asked_for: set[str] = set()
        self._rows: dict[str, list[str]] | None = None
        """Job → name, state and reason; None: the controller has not answered yet."""
        self._asked = -_ASK_SECONDS

    def submit(
        self, settings: ExecutorConfig, name: str, names: list[str], calls: list[_Here], folder: Path
    ) -> list[Record]:
        import submitit

        folder.mkdir(parents=True, exist_ok=True)
        parameters = {
            "timeout_min": settings.timeout_min, "cpus_per_task": settings.cpus_per_task, "name": f"mlxchat-{name}",
            "gpus_per_node": settings.gpus_per_node, "mem_gb": settings.mem_gb, "stderr_to_stdout": True,
            "slurm_partition": settings.partition, "slurm_account": settings.account, "slurm_qos": settings.qos,
            "slurm_constraint": settings.constraint, "slurm_setup": settings.setup or None,
            "slurm_signal_delay_s": settings.signal_delay_s, "slurm_array_parallelism": settings.array_parallelism,
            "slurm_additional_parameters": {"requeue": True, **settings.options},
        }  # fmt: skip
        executor = submitit.AutoExecutor(
            folder, cluster="local" if settings.kind == "submitit_local" else "slurm",
            slurm_max_num_timeout=settings.requeues, local_max_num_timeout=settings.requeues,
        )  # fmt: skip
        executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
        with executor.batch():
            jobs = [executor.submit(call) for call in calls]
        return [{"id": job.job_id, "log": str(job.paths.stdout), "queue": f"mlxchat-{name}"} for job in jobs]

    def look(self, facts: Record) -> State:
        array = facts["id"].partition("_")[0]
        if array not in self._asked_for or time.monotonic() - self._asked > _ASK_SECONDS:
            self._asked_for.add(array)
            self._ask()
        if self._rows is None:
            return State()
        name, state, reason = self._rows.get(facts["id"], ("", "", ""))
        if name != facts["queue"]:  # SLURM uses numbers again
            return State(is_over=True, why="no longer in the queue")
        waits = state == "PENDING"
        return State(state in _OVER, waits, state if state in _OVER else reason if waits and reason != "None" else "")

    def _ask(self) -> None:
        jobs = ",".join(sorted(self._asked_for))
        command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%j|%T|%r", f"--jobs={jobs}"]
        self._asked = time.monotonic()
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            if done.returncode == 0 or "Invalid job id" in done.stderr:
                self._rows = {row[0]: row[1:4] for row in (line.split("|") for line in done.stdout.splitlines())}

    def cancel(self, facts: Record, path: Path) -> None:
        subprocess.run(["scancel", facts["id"]], capture_output=True, timeout=60, check=False)
        self._asked = -_ASK_SECONDS


class _Local(_Slurm):
    """submitit without SLURM: a process of this machine."""

    def submit(
        self, settings: ExecutorConfig, name: str, names: list[str], calls: list[_Here], folder: Path
    ) -> list[Record]:
        found = super().submit(settings, name, names, calls, folder)
        return [each | {"born": self._born(each["id"])} for each in found]

    def look(self, facts: Record) -> State:
        with suppress(ChildProcessError):  # it is another process's child
            os.waitpid(int(facts["id"]), os.WNOHANG)
        is_there = facts["host"] == host_name() and self._born(facts["id"]) == facts["born"]
        return State(is_over=not is_there)

    def cancel(self, facts: Record, path: Path) -> None:
        if not self.look(facts).is_over:
            os.kill(int(facts["id"]), signal.SIGTERM)  # submitit's default leaves one second for saving

    @staticmethod
    def _born(pid: str) -> str:
        """Return when a process began: its number may be used again."""
        return subprocess.run(["ps", "-o", "lstart=", "-p", pid], capture_output=True, text=True, check=False).stdout


class _Ray:
    """Ray: a task is a detached actor, which outlives the command and starts again after the loss of its machine."""

    def submit(
        self, settings: ExecutorConfig, name: str, names: list[str], calls: list[_Here], folder: Path
    ) -> list[Record]:
        import ray

        self._connect(settings.address)
        found = []
        for each, call in zip(names, calls, strict=True):
            unique = f"{each}_{call.job}"
            ray.remote(_Actor).options(
                name=unique, lifetime="detached", num_cpus=settings.cpus_per_task,
                num_gpus=int(settings.gpus_per_node or 0), max_restarts=settings.requeues,
            ).remote(call)  # fmt: skip
            found.append({"id": unique})
        return found

    def look(self, facts: Record) -> State:
        import ray

        try:
            self._connect(facts["address"], start=False)
            ray.get_actor(facts["id"])
        except Exception:  # there is no such actor, or no cluster
            return State(is_over=True)
        return State()

    def cancel(self, facts: Record, path: Path) -> None:
        import ray

        Records(path).append({"cancel": facts["job"]})
        if not any(line.get("job") == facts["job"] and "started" in line for line in Records(path).read()):
            self._connect(facts["address"], start=False)
            ray.kill(ray.get_actor(facts["id"]), no_restart=True)

    @staticmethod
    def _connect(address: str | None, *, start: bool = True) -> None:
        """Connect to a cluster; with `start` and without an address start one here, which ends with this process."""
        import ray

        if not ray.is_initialized() and (start or address is not None):
            ray.init(address=address, namespace="mlxchat", include_dashboard=False, logging_level=logging.ERROR)


class _Actor:
    """A Ray actor that runs a call and ends: methods would not run again after the loss of a machine."""

    def __init__(self, call: _Here) -> None:
        import ray

        call()
        leave: Any = ray.actor.exit_actor  # without types, where Ray is installed
        leave()


_CLUSTERS: dict[str, _Slurm | _Ray] = {"slurm": _Slurm(), "submitit_local": _Local(), "ray": _Ray()}


@contextmanager
def environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables while the body runs; None removes one."""
    former = dict(os.environ)
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update({name: former[name] for name in variables if name in former})


@contextmanager
def queue_signals() -> Iterator[Leave | None]:
    """Stop the run at SLURM's signal; yield how to be queued again, None outside of a queue.

    SLURM sends SIGUSR2 (chosen by submitit) at the time limit and SIGTERM, twice, at preemption, in any order. The
    first signal makes the run save and stop; later ones must not end it before it has saved.
    """
    executor = os.environ.get("SUBMITIT_EXECUTOR")
    if executor not in ("slurm", "local"):
        yield None
        return
    requeue = signal.getsignal(signal.SIGUSR2)  # submitit's
    heard: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        stopping, stop = is_stopping(), signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not stopping and callable(stop):
            stop(signal.SIGTERM, frame)

    def leave() -> str:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not heard and executor == "local":
            return "it was cancelled"
        # Without a grace time SLURM queues a preempted job itself; with one, a job that ends early is over.
        if not heard and _state_of_this_job() != "RUNNING":
            print("stopped by SLURM; state saved. If SLURM queues the job again, it continues from there", flush=True)
            raise SystemExit(128 + signal.SIGTERM)
        try:
            if callable(requeue):
                requeue(signal.SIGUSR2, None)  # requests SLURM to queue the job again, and exits
        except Exception as error:  # submitit raises all kinds where it gives up
            return f"{error} executor.requeues limits how often. The same command continues"
        return "submitit does not queue it again. The same command continues"

    signal.signal(signal.SIGUSR2, hear)
    try:
        yield leave
    finally:
        signal.signal(signal.SIGUSR2, requeue)


def _state_of_this_job() -> str:
    """Return the state of the SLURM job that this process belongs to: CANCELLED, or RUNNING if it is preempted."""
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={os.environ.get('SLURM_JOB_ID')}"]
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.strip()
    return ""
