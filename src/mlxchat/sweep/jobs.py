"""A job of a sweep: run here or in an executor's process; its result is a row in the sweep's folder."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from mlxchat.composition.compose import Composed, compose_config
from mlxchat.config.secrets import redact
from mlxchat.errors import Interrupted, MlxchatError
from mlxchat.pipeline import plan_to_run, run_pipeline
from mlxchat.runner.plan import PlannedStep, entries_of, plan_again
from mlxchat.runner.process import heard_signals, leave_terminal
from mlxchat.store.store import Store
from mlxchat.sweep.results import Row, SweepFolder, metrics_of, settings_of

# Each look at the folder is a request to a file server.
_POLL_SECONDS = 1.0


def _reveal(overrides: list[str]) -> list[str]:
    """Replace names of secrets in overrides of sweep.json by their values in this process's environment."""

    def secret(found: re.Match[str]) -> str:
        value = os.environ.get(found[1])
        return value if value and redact(value) == found[0] else found[0]

    return [re.sub(r"<(\w+)>", secret, item) for item in overrides]


def run_elsewhere(place: str, number: int) -> None:
    """Run a job of a sweep in the process that the executor started; its row is the result.

    Args:
        place: the sweep's folder.
        number: number of the job.

    Raises:
        Interrupted: the queue, not the sweep, stopped the job, which then has no row.
    """
    folder = SweepFolder(Path(place))
    state = folder.state()
    overrides = _reveal(state["jobs"][str(number)]["overrides"])

    def prepare() -> tuple[Composed, list[PlannedStep]]:
        composed = compose_config(overrides, state["config_dirs"])
        config = replace(composed.config, executor=replace(composed.config.executor, kind="local"))
        store = Store(Path(config.outputs))
        plan = plan_to_run(config, store)
        if force := force_only_others(config.force, plan, set(state["made"])):
            plan = plan_again(plan, store, force=force)
        return replace(composed, config=config, overrides=overrides), plan

    with _prefixed(f"[{number}] "), _stopping_with(folder):
        os.chdir(state["parent"]["cwd"])
        run_job(folder, number, overrides, prepare, is_queued=True)


def run_job(
    folder: SweepFolder, number: int, overrides: list[str], prepare: Callable[[], tuple[Composed, list[PlannedStep]]],
    *, is_queued: bool = False,
) -> Row:  # fmt: skip
    """Run one job, write its row to the folder, and return it. A failure is a row.

    Args:
        folder: the sweep's folder.
        number: number of the job.
        overrides: overrides of the job.
        prepare: returns its configuration and plan.
        is_queued: whether a queue may stop the job, which then has no row.

    Raises:
        Interrupted: the queue stopped it.
    """
    row: Row = {"job": number, "overrides": settings_of(overrides), "status": "done", "metrics": {}}
    began = time.monotonic()
    if folder.stop():
        row["status"] = "not run"
        folder.add_row(row)
        return row
    fail_fast = False
    try:
        composed, plan = prepare()
        config = composed.config
        fail_fast = config.fail_fast
        row["steps"] = entries_of(plan)
        run_pipeline(composed, plan, job=f"job{number}")
        row |= {
            "steps": entries_of(plan),
            "metrics": metrics_of(plan, Store(Path(config.outputs)), config.sweep.metric),
        }  # fmt: skip
    except Interrupted as stop:
        if is_queued and not folder.stop():
            raise
        row |= {"status": "interrupted", "error": str(stop)}
        folder.ask_to_stop("signal", stop.exit_code - 128)
    except Exception as error:  # any failure of a job is a row of the table; the other jobs continue
        if not isinstance(error, MlxchatError):
            log = folder.path / f"job-{number}-error.log"
            log.write_text(redact(traceback.format_exc()), encoding="utf-8")
            error = MlxchatError(f"{type(error).__name__}: {error} (traceback: {log})")
        print(redact(f"error: {error}"), file=sys.stderr, flush=True)
        row |= {"status": "failed", "error": str(error).splitlines()[0]}
        if fail_fast:
            folder.ask_to_stop("fail_fast", signal.SIGTERM)
    row["seconds"] = round(time.monotonic() - began, 1)
    folder.add_row(row)
    return row


def force_only_others(force: list[str], plan: list[PlannedStep], made: set[str]) -> list[str]:
    """Return the forced steps of a plan that this sweep has not run yet."""
    return [step.name for step in plan if step.key not in made and (step.name in force or "all" in force)]


def whereabouts() -> dict[str, Any]:
    """Return pid, host and working directory of this process, for jobs in other processes."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "cwd": str(Path.cwd())}


@contextmanager
def watched(
    folder: SweepFolder, told: set[int], tell: Callable[[Row], None], *, outlived: bool = False
) -> Iterator[None]:
    """Call `tell` with each job's row that is not in `told` yet, while the body runs; a signal asks all jobs to stop.

    It is called in another thread, because launchers return only after all jobs. If the jobs outlive this process
    (`outlived`), only Ctrl-C stops them; SIGTERM and SIGHUP raise Interrupted.
    """
    ended = threading.Event()

    def look() -> None:
        for number, row in sorted(folder.rows().items()):
            if number not in told:
                told.add(number)
                tell(row)

    def watch() -> None:
        while not ended.wait(_POLL_SECONDS):
            look()

    def request_stop(number: int, frame: object) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        if outlived and number != signal.SIGINT:
            raise Interrupted(
                "stopped; the jobs continue: the same command awaits them, mlxchat status --cancel ends them.", number
            )
        if folder.stop():
            os._exit(128 + number)  # jobs notice that the lock is free, and end
        folder.ask_to_stop("signal", number)
        print(
            "stopping: jobs end after their current iteration, no further job starts (again: stop at once)", flush=True
        )

    previous = {number: signal.signal(number, request_stop) for number in heard_signals()}
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        look()
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Prefixed(io.TextIOBase):
    """A stream that prefixes each line and writes it in one piece, so that lines of several processes do not mix."""

    def __init__(self, stream: TextIO, prefix: str) -> None:
        self.stream, self.prefix, self.begun = stream, prefix, ""

    def write(self, text: str) -> int:
        *lines, self.begun = (self.begun + text).split("\n")
        if lines:
            self.stream.write("".join(f"{self.prefix}{line}\n" for line in lines))
            self.stream.flush()
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        """Return False: progress bars of several processes would overwrite each other."""
        return False

    def fileno(self) -> int:
        return self.stream.fileno()


@contextmanager
def _prefixed(prefix: str) -> Iterator[None]:
    out, err = _Prefixed(sys.stdout, prefix), _Prefixed(sys.stderr, prefix)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            yield
    finally:
        for stream in (out, err):
            if stream.begun:
                stream.write("\n")


@contextmanager
def _stopping_with(folder: SweepFolder) -> Iterator[None]:
    """Send this process one SIGTERM when the sweep is stopped. It continues without the sweep's own process."""
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":  # SLURM may identify its processes by their group
        with suppress(OSError):
            os.setpgid(0, 0)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_POLL_SECONDS):
            if folder.stop():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def refuse(number: int, frame: object) -> None:
        raise Interrupted("the job stopped between two steps. The same command continues the sweep from there.", number)

    former = signal.signal(signal.SIGTERM, refuse)  # a run replaces this handler by its own
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGTERM, former)
