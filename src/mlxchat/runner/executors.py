"""Jobs on other machines: SLURM's queue through submitit, or a Ray cluster.

A job is a pickled call that runs in another process with access to the same files. When SLURM stops a job because of
its time limit or preemption, the job saves its state and is queued again.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from mlxchat.config.schema import ExecutorConfig
from mlxchat.errors import ConfigError, StepFailed
from mlxchat.runner.process import is_stopping

Leave = Callable[[], str]
"""Returns the job to its queue and does not return, or returns why it cannot."""
Call = Callable[[Leave | None], Any]
"""The work of a job; its argument is None outside of a queue."""

_LIBRARIES = {"slurm": "submitit", "submitit_local": "submitit", "ray": "ray"}
# Once MLX is loaded, these are set for its compiler; child processes need the former values.
AS_STARTED = {name: os.environ.get(name) for name in ("PATH", "TMPDIR")}
# submitit itself asks sacct only every ten minutes whether a job without a result has ended.
_ASK_SECONDS = 60
# Lines around the traceback in its errors.
_RULE = "\n----------------------\n"


class LostJob(StepFailed):
    """A job ended without a result: killed, or its machine was lost."""


class Job(Protocol):
    """A submitted call."""

    name: str
    """Name of the job with its executor, for messages."""

    def done(self) -> bool:
        """Return True if it has ended in any way."""

    def result(self) -> Any:
        """Return the result of the call of a finished job.

        Raises:
            LostJob: there is no result.
        """

    def cancel(self) -> None:
        """Remove it from the queue, or let it save and end."""


def check_installed(settings: ExecutorConfig) -> None:
    """Refuse an executor whose library is missing.

    Raises:
        ConfigError: names the command to install it.
    """
    library = _LIBRARIES.get(settings.kind)
    if library is not None and find_spec(library) is None:
        raise ConfigError(f"executor={settings.kind} needs {library}: pip install 'mlxchat[{library}]'")


def submit(settings: ExecutorConfig, calls: Sequence[Call], folder: Path) -> list[Job]:
    """Submit calls, several to SLURM as one job array, and return their jobs.

    Args:
        settings: the executor and its resources.
        calls: picklable calls.
        folder: folder for submitit's inputs, results and logs, on a file system that all machines share.

    Raises:
        ConfigError: they cannot be submitted here.
    """
    here = [_Here(call, Path.cwd()) for call in calls]
    with environment(AS_STARTED):
        return _submit_to_ray(settings, here) if settings.kind == "ray" else _submit_to_slurm(settings, here, folder)


@dataclass(frozen=True)
class _Here:
    """A call that runs in the working directory of the submitting process."""

    call: Call
    cwd: Path

    def __call__(self) -> Any:
        """Run the call inside its job."""
        os.chdir(self.cwd)
        with queue_signals() as leave:
            return self.call(leave)

    def checkpoint(self) -> Any:
        """Return what submitit queues at the time limit: the call as it was submitted, without traces of this start."""
        from submitit import JobEnvironment
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission.load(JobEnvironment().paths.submitted_pickle)


def _submit_to_slurm(settings: ExecutorConfig, calls: Sequence[_Here], folder: Path) -> list[Job]:
    import submitit

    folder.mkdir(parents=True, exist_ok=True)
    is_local = settings.kind == "submitit_local"
    parameters = {
        "timeout_min": settings.timeout_min, "cpus_per_task": settings.cpus_per_task, "name": "mlxchat",
        "gpus_per_node": settings.gpus_per_node, "mem_gb": settings.mem_gb, "stderr_to_stdout": True,
        "slurm_partition": settings.partition, "slurm_account": settings.account, "slurm_qos": settings.qos,
        "slurm_constraint": settings.constraint, "slurm_setup": settings.setup or None,
        "slurm_signal_delay_s": settings.signal_delay_s, "slurm_array_parallelism": settings.array_parallelism,
        "slurm_additional_parameters": {"requeue": True, **settings.options},
    }  # fmt: skip
    try:
        executor = submitit.AutoExecutor(
            folder, cluster="local" if is_local else "slurm",
            slurm_max_num_timeout=settings.requeues, local_max_num_timeout=settings.requeues,
        )  # fmt: skip
        executor.update_parameters(**{name: value for name, value in parameters.items() if value is not None})
        with executor.batch():
            jobs = [executor.submit(call) for call in calls]
    except Exception as error:  # submitit has no specific exception for an unreachable or refusing cluster
        raise ConfigError(f"executor={settings.kind}: {str(error).splitlines()[0]}") from None
    return [_SubmititJob(job, is_local=is_local) for job in jobs]


class _SubmititJob:
    """A submitit job."""

    def __init__(self, job: Any, *, is_local: bool) -> None:
        self.job, self.is_local = job, is_local
        self.name = f"{'submitit' if is_local else 'SLURM'} job {job.job_id}"
        with suppress(AttributeError):
            job.watcher._delay_s = min(job.watcher._delay_s, _ASK_SECONDS)

    def done(self) -> bool:
        return bool(self.job.done())

    def result(self) -> Any:
        try:
            return self.job.result()
        except Exception as error:  # any of submitit's exceptions: no result, or a traceback of the job
            trace = str(error).split(_RULE)[1:2]
            how = trace[0].strip().splitlines()[-1] if trace else f"state: {self.job.state}"
            raise LostJob(f"{self.name} was lost ({how}). Its log: {self.job.paths.stdout}") from None

    def cancel(self) -> None:
        with suppress(OSError):
            if self.is_local:
                os.kill(int(self.job.job_id), signal.SIGTERM)  # submitit's default leaves one second for saving
            else:
                self.job.cancel(check=False)


def _submit_to_ray(settings: ExecutorConfig, calls: Sequence[_Here]) -> list[Job]:
    import ray

    try:
        if not ray.is_initialized():
            ray.init(address=settings.address, include_dashboard=False, logging_level=logging.ERROR)
        run = ray.remote(
            num_cpus=settings.cpus_per_task, num_gpus=settings.gpus_per_node or 0, max_retries=settings.requeues
        )(_run)
        return [_RayJob(run.remote(call)) for call in calls]
    except Exception as error:  # of many kinds
        raise ConfigError(f"executor=ray: {str(error).splitlines()[0]}") from None


def _run(call: _Here) -> Any:
    return call()


class _RayJob:
    """A Ray task."""

    def __init__(self, reference: Any) -> None:
        self.reference = reference
        self.name = f"Ray task {reference.task_id().hex()[:12]}"

    def done(self) -> bool:
        import ray

        return bool(ray.wait([self.reference], timeout=0)[0])

    def result(self) -> Any:
        import ray

        try:
            return ray.get(self.reference)
        except Exception as error:  # Ray's own, of many kinds
            raise LostJob(f"{self.name} was lost ({str(error).splitlines()[0]})") from None

    def cancel(self) -> None:
        import ray

        with suppress(Exception):
            ray.cancel(self.reference)


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
