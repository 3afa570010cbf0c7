"""One job of a sweep, in whichever process it runs: its result is a row in a file, its lines begin with its number."""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from mlxchat.compose import Composed
from mlxchat.errors import Interrupted, MlxchatError
from mlxchat.runner import locks
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.secrets import redact
from mlxchat.runner.store import Store
from mlxchat.sweep.folder import Row, SweepFolder, metrics_of
from mlxchat.sweep.slurm import Leave, in_queue, leaving

_POLL_SECONDS = 0.3
# From another host each look is a request to a file server, of every job.
_FAR_POLL_SECONDS = 3.0
_UNSEEN = (
    "{here} does not see the lock of the sweep, which process {pid} on {host} holds: either that one has ended, or the "
    "file system of outputs keeps locks to each host. To find out: mlxchat doctor --hosts, on both"
)


def run_job(
    folder: SweepFolder, number: int, overrides: list[str], composed: Composed, settings: dict[str, Any],
    made: set[str], leave: Leave | None = None,
) -> Row:  # fmt: skip
    """Run one job and return its row, which is in the folder then too. A failure is a row.

    Args:
        folder: the sweep's folder.
        number: of the job.
        overrides: of the job.
        composed: its configuration.
        settings: what the row says about the job.
        made: ids of steps that this sweep has made, which are not forced again.
        leave: what to do when not the sweep but the queue that the job came from stops it; the job has no row then.
    """
    from mlxchat.pipeline_run import plan_to_run, run_pipeline

    row: Row = {"job": number, "overrides": settings, "status": "done", "metrics": {}}
    began = time.monotonic()
    if folder.stop():
        row["status"] = "not run"
        folder.add_row(row)
        return row
    config = composed.config
    store = Store(Path(config.outputs))
    try:
        plan = plan_to_run(config, store)
        forced = force_only_others(config.force, plan, made)
        place = run_pipeline(replace(composed, config=replace(config, force=forced), overrides=overrides))
        row |= {"run": place.name if place else None, "metrics": metrics_of(rids_of(plan), store, config.sweep.metric)}
    except Interrupted as stop:
        row |= {"status": "interrupted", "error": str(stop)}
        if leave is not None and not folder.stop() and locks.is_held(folder.lock):
            row["error"] = f"its time was up, and it is not queued again: {leave()}"
        else:
            folder.ask_to_stop("signal", stop.exit_code - 128)
    except Exception as error:
        if not isinstance(error, MlxchatError):
            log = folder.path / f"job-{number}-error.log"
            log.write_text(redact(traceback.format_exc()), encoding="utf-8")
            error = MlxchatError(f"{type(error).__name__}: {error} (traceback: {log})")
        print(redact(f"error: {error}"), file=sys.stderr, flush=True)
        row |= {"status": "failed", "error": str(error).splitlines()[0]}
        if config.fail_fast:
            folder.ask_to_stop("fail_fast", signal.SIGTERM)
    row["seconds"] = round(time.monotonic() - began, 1)
    folder.add_row(row)
    return row


def run_elsewhere(composed: Any) -> None:
    """Run a job that a launcher started: the task that Hydra's launchers are given, most of them in other processes."""
    from hydra.core.hydra_config import HydraConfig

    from mlxchat.compose import to_typed

    hydra = HydraConfig.get()
    folder = SweepFolder(Path(hydra.sweep.dir))
    state = folder.state()
    number = state["pending"][hydra.job.num]
    job = state["jobs"][str(number)]
    choices = {str(group): str(option) for group, option in hydra.runtime.choices.items() if "hydra" not in str(group)}
    at_home = os.getpid() == state["parent"]["pid"] and socket.gethostname() == state["parent"]["host"]
    folder.begin(number)
    if socket.gethostname() != state["parent"]["host"] and not locks.is_held(folder.lock):
        row: Row = {"job": number, "overrides": job["settings"], "status": "failed", "metrics": {}}
        folder.add_row(row | {"error": _UNSEEN.format(here=socket.gethostname(), **state["parent"])})
        return
    with _prefixed(f"[{number}] "), _stopping_with(folder, state["parent"], at_home=at_home), leaving() as leave:
        if not at_home:
            os.chdir(state["parent"]["cwd"])
        run_job(
            folder, number, job["overrides"], Composed(to_typed(composed), job["overrides"], choices),
            job["settings"], set(state["made"]), leave,
        )  # fmt: skip


def rids_of(plan: list[PlannedStep]) -> dict[str, str]:
    """Return step → id."""
    return {step.name: step.rid for step in plan}


def is_finished(plan: list[PlannedStep]) -> bool:
    """Tell whether nothing of a plan has to be computed or given its name in the store."""
    return all(step.done and step.verdict.original is None for step in plan)


def force_only_others(force: list[str], plan: list[PlannedStep], made: set[str]) -> list[str]:
    """Return the steps of a plan that are to be run again although they are done, without those just made."""
    return [step.name for step in plan if step.rid not in made and (step.name in force or "all" in force)]


class _Prefixed(io.TextIOBase):
    """A stream whose lines begin with a prefix, each written in one piece, so that those of many processes mix well."""

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
        """Tell that this is no terminal: bars of several processes would overwrite each other."""
        return False

    def fileno(self) -> int:
        return self.stream.fileno()


@contextmanager
def _prefixed(prefix: str) -> Iterator[None]:
    former = sys.stdout, sys.stderr
    out, err = _Prefixed(former[0], prefix), _Prefixed(former[1], prefix)
    sys.stdout, sys.stderr = out, err
    try:
        yield
    finally:
        sys.stdout, sys.stderr = former
        for stream in (out, err):
            if stream.begun:
                stream.write("\n")


@contextmanager
def _stopping_with(folder: SweepFolder, parent: dict[str, Any], *, at_home: bool) -> Iterator[None]:
    """Send this process one SIGTERM when the sweep is to stop, or nobody waits for it any more.

    The terminal's Ctrl-C reaches only the process that was started there, since a second signal means "at once".

    Args:
        folder: where the word to stop is looked for, and whose lock is free once nobody waits.
        parent: where the sweep's own process is.
        at_home: whether this is the sweep's own process, which gets its signals itself.
    """
    if at_home:
        yield
        return
    if not in_queue():  # SLURM may know its processes by their group
        with suppress(OSError):
            os.setpgid(0, 0)
    ended = threading.Event()
    pause = _POLL_SECONDS if socket.gethostname() == parent["host"] else _FAR_POLL_SECONDS

    def watch() -> None:
        told = False
        while not ended.wait(pause):
            stop, orphaned = folder.stop(), not locks.is_held(folder.lock)
            if not told and (stop or orphaned):
                told = True
                os.kill(os.getpid(), signal.SIGTERM)
                if not stop:
                    return
            elif told and orphaned:  # whoever asked for an end asked twice, and has left
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def refuse(number: int, frame: object) -> None:
        raise Interrupted("stopped between its steps. The same command continues from there.", number)

    former = signal.signal(signal.SIGTERM, refuse)  # a run puts its own handler in this one's place
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGTERM, former)
        if not locks.is_held(folder.lock):
            os._exit(1)  # nobody takes the result or gives more to do; idle workers would stay for minutes
