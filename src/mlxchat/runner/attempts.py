"""The executions of a step: one per start, with how it ended. A start without an end was killed.

work/<rid>/attempts.jsonl holds a line per start and a line per end.
"""

from __future__ import annotations

import os
import socket
from datetime import datetime
from pathlib import Path

from mlxchat.runner.records import Record, Records, now


def start(work: Path, run: str, step: str) -> int:
    """Record the start of an execution in this process; return its number, from 1."""
    log = Records(work / "attempts.jsonl")
    number = sum("started" in record for record in log.read()) + 1
    record = {"attempt": number, "step": step, "started": now(), "pid": os.getpid(), "host": socket.gethostname()}
    log.append({**record, "run": run})
    return number


def finish(work: Path, number: int, outcome: str, error: str | None, resumed_from: int | None) -> None:
    """Record how an execution ended: done, failed or interrupted."""
    record = {"attempt": number, "ended": now(), "outcome": outcome, "error": error, "resumed_from": resumed_from}
    Records(work / "attempts.jsonl").append(record)


def read(work: Path) -> list[Record]:
    """Return a record per execution: attempt, started, ended, outcome, seconds, pid, host, run, resumed_from, error."""
    merged: dict[int, Record] = {}
    for record in Records(work / "attempts.jsonl").read():
        merged.setdefault(record["attempt"], {"outcome": "killed", "ended": None}).update(record)
    for record in merged.values():
        record["seconds"] = _seconds(record)
    return list(merged.values())


def failure_since(work: Path, moment: str) -> str | None:
    """Return the error of the last execution if it failed after `moment` (ISO time), else None."""
    executions = read(work)
    if executions and executions[-1]["outcome"] == "failed" and (executions[-1]["ended"] or "") >= moment:
        return str(executions[-1]["error"])
    return None


def _seconds(record: Record) -> float | None:
    if record["ended"] is None:
        return None
    elapsed = datetime.fromisoformat(record["ended"]) - datetime.fromisoformat(record["started"])
    return elapsed.total_seconds()
