"""Jobs on other machines: SLURM's queue through submitit, or a Ray cluster.

A job is a function of mlxchat that is called with plain arguments, in the folder and with the code of the command that
submitted it. What it makes is in the store. Its record, a file of `outputs/jobs`, has a line for its submission, for
each start and for its end, so a later command finds the job and awaits it. When SLURM stops a job because of its time
limit or preemption, the job saves its state and is queued again.
"""

import logging
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from mlxchat.config.schema import ExecutorConfig
from mlxchat.errors import ConfigError, Interrupted, MlxchatError
from mlxchat.store.files import Record, Records, now
from mlxchat.store.locks import host_name

_LIBRARIES = {"slurm": "submitit", "submitit_local": "submitit", "ray": "ray"}
_NAMES = {"slurm": "SLURM job", "submitit_local": "submitit job", "ray": "Ray task"}
# At most so often squeue is run.
_ASK_SECONDS = 10.0
# A file server may show the last line of a record this long after its job has ended.
_LATE_SECONDS = 3.0
_WATCH_SECONDS = 1.0
_GONE = "no longer in the queue"
_OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT", _GONE,
}  # fmt: skip


class Job:
    """A submitted call. Any process that sees its record can use it."""

    def __init__(self, path: Path) -> None:
        self.path, self.is_cancelled = path, False
        self._read()

    def _read(self) -> None:
        lines = Records(self.path).read()
        self.facts: Record = next((line for line in reversed(lines) if "id" in line), {"kind": "", "id": "", "job": ""})
        own = [line for line in lines if line.get("job") == self.facts["job"]]
        self.starts = [line for line in own if "started" in line]
        self.end = next((line for line in own if "ended" in line), None)
        self.name = f"{_NAMES.get(self.facts['kind'], 'job')} {self.facts['id']}"

    def state(self) -> str:
        """Return SLURM's word for its state; of other jobs _GONE, or "" while they run."""
        cluster = _CLUSTERS.get(self.facts["kind"])
        return _GONE if cluster is None else cluster.look(self.facts)

    def done(self) -> bool:
        """Read its record again; return True if it has ended in any way."""
        self._read()
        if self.end is None and self.state() in _OVER:
            time.sleep(_LATE_SECONDS)
            self._read()
            return True
        return self.end is not None

    def take(self) -> str:
        """Remove the record of a finished job; return why its call failed or was lost, "" if it returned."""
        self.path.unlink(missing_ok=True)
        if self.end is not None:
            return str(self.end["error"])
        log = f" Its log: {self.facts['log']}" if self.facts.get("log") else ""
        return f"{self.name} was lost ({self.state() or 'its process ended'}).{log}"

    def describe(self) -> str:
        """Return its state in words: is queued, runs on a host, or has ended."""
        state = self.state()
        if self.end is not None or state in _OVER:
            return "has ended"
        if state == "PENDING" or not self.starts:
            return f"is queued{' again' if self.starts else ''}"
        return f"runs on {self.starts[-1]['host']}"

    @property
    def outlives(self) -> bool:
        """Whether it continues if this process ends: a Ray that this process started ends with it."""
        return self.facts["kind"] != "ray" or self.facts["address"] is not None

    def cancel(self) -> None:
        """Remove it from the queue, or let it save and end."""
        if self.is_cancelled:
            return
        self.is_cancelled = True
        Records(self.path).append({"cancel": self.facts["job"]})
        with suppress(Exception):  # the cluster may be gone
            _CLUSTERS[self.facts["kind"]].cancel(self)


def attach(path: Path) -> Job | None:
    """Return the job of a record if it is queued or runs."""
    job = Job(path)
    return None if job.end is not None or job.state() in _OVER else job


def check_installed(settings: ExecutorConfig) -> None:
    """Raise a ConfigError with the command to install the executor's library if it is missing."""
    library = _LIBRARIES.get(settings.kind)
    if library is not None and find_spec(library) is None:
        raise ConfigError(f"executor={settings.kind} needs {library}: pip install 'mlxchat[{library}]'")


def submit(
    settings: ExecutorConfig, name: str, call: Callable[[], None], record: Path, facts: Mapping[str, str], folder: Path
) -> Job:
    """Submit a call and return its job.

    Args:
        settings: the executor and its resources.
        name: name in SLURM's queue.
        call: `partial` of a function of a module with texts and numbers; raises Interrupted if a signal stopped it.
        record: record of the job, a file of `outputs/jobs`.
        facts: further facts for the record.
        folder: for submitit's inputs and logs, on a file system that all machines share.
    """
    here = _Here(call, Path.cwd(), record.resolve(), os.urandom(4).hex(), settings.kind)
    try:
        known = _CLUSTERS[settings.kind].submit(settings, name, here, folder)
    except Exception as error:  # of many kinds: the cluster refuses, or cannot be reached
        raise ConfigError(f"executor={settings.kind}: {(str(error).splitlines() or ['?'])[0]}") from None
    shared: Record = {"job": here.job, "kind": settings.kind, "submitted": now(), "host": host_name()}
    shared["address"] = settings.address or os.environ.get("RAY_ADDRESS")
    Records(record).append({**shared, **facts, **known})
    return Job(record)


@dataclass(frozen=True)
class _Here:
    """A call inside its job: in the working directory of the submitting process, with its starts and end recorded."""

    call: Callable[[], None]
    cwd: Path
    record: Path
    job: str  # distinguishes it from other jobs with this record
    kind: str

    def __call__(self) -> None:
        """Run the call. A job that is to start again has no end."""
        os.chdir(self.cwd)
        record = Records(self.record)
        record.append({"job": self.job, "started": now(), "host": host_name(), "pid": os.getpid()})
        error = ""
        try:
            with self._stopping() as leave:
                try:
                    self.call()
                except Interrupted as stop:
                    error = f"{stop}\nIts job ended: {leave()}"
        except MlxchatError as refusal:
            error = str(refusal)
        except Exception as failure:
            record.append({"job": self.job, "ended": now(), "error": f"{type(failure).__name__}: {failure}"})
            raise  # the log shows where
        record.append({"job": self.job, "ended": now(), "error": error})

    def checkpoint(self) -> Any:
        """Return what submitit queues at the time limit: the same call."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    @contextmanager
    def _stopping(self) -> Iterator[Callable[[], str]]:
        """Stop the run at SLURM's signals and when the record requests it.

        SLURM sends SIGUSR2 (chosen by submitit) at the time limit and SIGTERM, twice, at preemption, in any order.
        Yields a function that returns a stopped job to its queue, or returns why it does not.
        """
        ended = threading.Event()
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's
        at_limit: list[int] = []

        def hear(number: int, frame: FrameType | None) -> None:
            at_limit.append(number)
            signal.raise_signal(signal.SIGTERM)

        def is_cancelled() -> bool:
            return any(line.get("cancel") == self.job for line in Records(self.record).read())

        def watch() -> None:
            while not ended.wait(_WATCH_SECONDS):
                if is_cancelled():
                    os.kill(os.getpid(), signal.SIGTERM)
                    return

        def leave() -> str:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if is_cancelled():
                return "it was cancelled"
            if self.kind == "ray":
                os._exit(128 + signal.SIGTERM)  # Ray starts it again
            # Without a grace time SLURM queues a preempted job itself; with one, a job that ends early is over.
            state = _ask_squeue("--format=%T", f"--jobs={os.environ.get('SLURM_JOB_ID')}") or ""
            if not at_limit and state.strip() != "RUNNING":
                print("stopped by SLURM; state saved. If SLURM queues the job again, it continues", flush=True)
                raise SystemExit(128 + signal.SIGTERM)
            try:
                if callable(requeue):
                    requeue(signal.SIGUSR2, None)  # requests SLURM to queue the job again, and exits
            except Exception as error:  # submitit raises all kinds where it gives up
                return f"{error} executor.requeues limits how often. The same command continues"
            return "submitit does not queue it again. The same command continues"

        signal.signal(signal.SIGUSR2, hear)
        threading.Thread(target=watch, name="cancel", daemon=True).start()
        try:
            yield leave
        finally:
            ended.set()
            signal.signal(signal.SIGUSR2, requeue)


def _ask_squeue(*options: str) -> str | None:
    """Return what squeue prints; None if it does not answer."""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["squeue", "--noheader", *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return None


class _Slurm:
    """SLURM, through submitit for scripts and requeueing, and squeue, which needs no accounting, for states."""

    def __init__(self) -> None:
        self._rows: dict[str, list[str]] | None = None
        """Job → name and state, of all jobs of this user; None: the controller has not answered yet."""
        self._asked = -_ASK_SECONDS

    def submit(self, settings: ExecutorConfig, name: str, call: _Here, folder: Path) -> Record:
        import submitit

        folder.mkdir(parents=True, exist_ok=True)
        parameters = {
            "timeout_min": settings.timeout_min, "cpus_per_task": settings.cpus_per_task, "name": f"mlxchat-{name}",
            "gpus_per_node": settings.gpus_per_node, "mem_gb": settings.mem_gb, "stderr_to_stdout": True,
            "slurm_partition": settings.partition, "slurm_setup": settings.setup or None,
            "slurm_signal_delay_s": settings.signal_delay_s,
            "slurm_additional_parameters": {"requeue": True, **settings.options},
        }  # fmt: skip
        executor = submitit.AutoExecutor(
            folder, cluster="local" if settings.kind == "submitit_local" else "slurm",
            slurm_max_num_timeout=settings.requeues, local_max_num_timeout=settings.requeues,
        )  # fmt: skip
        executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
        job = executor.submit(call)
        self._asked = -_ASK_SECONDS
        return {"id": job.job_id, "log": str(job.paths.stdout), "queue": f"mlxchat-{name}"}

    def look(self, facts: Record) -> str:
        if time.monotonic() - self._asked > _ASK_SECONDS:
            self._asked = time.monotonic()
            if (text := _ask_squeue("--me", "--array", "--states=all", "--format=%i|%j|%T")) is not None:
                self._rows = {id: rest for id, *rest in (line.split("|") for line in text.splitlines())}
        if self._rows is None:
            return ""
        name, state = self._rows.get(facts["id"], ("", ""))
        return state if name == facts["queue"] else _GONE  # SLURM uses numbers again

    def cancel(self, job: Job) -> None:
        """Take a job out of the queue; one that runs sees the request in its record, or the signal."""
        subprocess.run(["scancel", job.facts["id"]], capture_output=True, timeout=60, check=False)
        self._asked = -_ASK_SECONDS


class _Local(_Slurm):
    """submitit without SLURM: a process of this machine."""

    def look(self, facts: Record) -> str:
        if facts["host"] == host_name():
            with suppress(ChildProcessError):  # it is another process's child
                os.waitpid(int(facts["id"]), os.WNOHANG)
            with suppress(ProcessLookupError):
                os.kill(int(facts["id"]), 0)
                return ""
        return _GONE

    def cancel(self, job: Job) -> None:
        """Do nothing: it runs at once, and sees the request in its record."""


class _Ray:
    """Ray: a task is a detached actor, which outlives the command and starts again after the loss of its machine."""

    def submit(self, settings: ExecutorConfig, name: str, call: _Here, folder: Path) -> Record:
        import ray

        self._connect(settings.address)
        id = f"{name}_{call.job}"
        ray.remote(_Actor).options(
            name=id, lifetime="detached", num_cpus=settings.cpus_per_task,
            num_gpus=int(settings.gpus_per_node or 0), max_restarts=settings.requeues,
        ).remote(call)  # fmt: skip
        return {"id": id}

    def look(self, facts: Record) -> str:
        import ray

        try:
            self._connect(facts["address"], start=False)
            ray.get_actor(facts["id"])
        except Exception:  # there is no such actor, or no cluster
            return _GONE
        return ""

    def cancel(self, job: Job) -> None:
        import ray

        if not job.starts:
            self._connect(job.facts["address"], start=False)
            ray.kill(ray.get_actor(job.facts["id"]), no_restart=True)

    @staticmethod
    def _connect(address: str | None, *, start: bool = True) -> None:
        """Connect to a cluster; with `start` and without an address start one here, which ends with this process."""
        import ray

        if not ray.is_initialized() and (start or address is not None):
            # On a CPU, TMPDIR is the folder of MLX's kernels by now, too long a path for Ray's sockets.
            own: dict[str, Any] = {"_temp_dir": f"{tempfile.gettempdir()}/ray", "include_dashboard": False}
            ray.init(address=address, namespace="mlxchat", logging_level=logging.ERROR, **({} if address else own))


class _Actor:
    """A Ray actor that runs a call and ends: methods would not run again after the loss of a machine."""

    def __init__(self, call: _Here) -> None:
        import ray

        call()
        leave: Any = ray.actor.exit_actor  # without types, where Ray is installed
        leave()


_CLUSTERS: dict[str, _Slurm | _Ray] = {"slurm": _Slurm(), "submitit_local": _Local(), "ray": _Ray()}
