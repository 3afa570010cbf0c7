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

_POLL_SECONDS = 0.3


def run_job(
    folder: SweepFolder, number: int, overrides: list[str], composed: Composed, settings: dict[str, Any], made: set[str]
) -> Row:
    """Run one job and return its row, which is in the folder then too. A failure is a row.

    Args:
        folder: the sweep's folder.
        number: of the job.
        overrides: of the job.
        composed: its configuration.
        settings: what the row says about the job.
        made: ids of steps that this sweep has made, which are not forced again.
    """
    from mlxchat.pipeline_run import plan_of, run_pipeline

    row: Row = {"job": number, "overrides": settings, "status": "done", "metrics": {}}
    began = time.monotonic()
    if folder.stop():
        row["status"] = "not run"
        folder.add_row(row)
        return row
    config = composed.config
    store = Store(Path(config.outputs))
    try:
        plan = plan_of(config, store)
        forced = force_only_others(config.force, plan, made)
        place = run_pipeline(replace(composed, config=replace(config, force=forced), overrides=overrides))
        row |= {"run": place.name if place else None, "metrics": metrics_of(rids_of(plan), store)}
    except Interrupted as stop:
        row |= {"status": "interrupted", "error": str(stop)}
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
    with _prefixed(f"[{number}] "), _stopping_with(folder, at_home=at_home):
        if not at_home:
            os.chdir(state["parent"]["cwd"])
        run_job(
            folder, number, job["overrides"], Composed(to_typed(composed), job["overrides"], choices),
            job["settings"], set(state["made"]),
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
def _stopping_with(folder: SweepFolder, *, at_home: bool) -> Iterator[None]:
    """Send this process one SIGTERM when the sweep is to stop, or nobody waits for it any more.

    The terminal's Ctrl-C reaches only the process that was started there, since a second signal means "at once".

    Args:
        folder: where the word to stop is looked for, and whose lock is free once nobody waits.
        at_home: whether this is the sweep's own process, which gets its signals itself.
    """
    if at_home:
        yield
        return
    with suppress(OSError):
        os.setpgid(0, 0)
    ended = threading.Event()

    def watch() -> None:
        told = False
        while not ended.wait(_POLL_SECONDS):
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
