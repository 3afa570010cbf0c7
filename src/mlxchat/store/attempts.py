"""The executions of a step. work/<key>/attempts.jsonl has a line per start and a line per end.

An execution without an end was killed.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from mlxchat.store.files import Record, Records, list_folder, now
from mlxchat.store.locks import host_name

# (work folder, number) → start of an execution of this process by the monotonic clock, in seconds.
_began: dict[tuple[Path, int], float] = {}


def start(work: Path, run: str, step: str) -> int:
    """Record the start of an execution in this process; return its number, from 1."""
    log = Records(work / "attempts.jsonl")
    number = sum("started" in record for record in log.read()) + 1
    record = {"attempt": number, "step": step, "started": now(), "pid": os.getpid(), "host": host_name()}
    log.append({**record, "run": run})
    _began[work, number] = time.monotonic()
    return number


def finish(work: Path, number: int, outcome: str, error: str | None, resumed_from: int | None) -> None:
    """Record how an execution ended: done, failed or interrupted."""
    record = {"attempt": number, "ended": now(), "outcome": outcome, "error": error, "resumed_from": resumed_from}
    began = _began.pop((work, number), None)
    if began is not None:
        record["seconds"] = round(time.monotonic() - began, 3)
    Records(work / "attempts.jsonl").append(record)


def read(work: Path) -> list[Record]:
    """Return a record per execution: attempt, started, ended, outcome, seconds, pid, host, run, resumed_from, error.

    One that runs in this process has the outcome `running` and the seconds so far.
    """
    merged: dict[int, Record] = {}
    for record in Records(work / "attempts.jsonl").read():
        if isinstance(record.get("attempt"), int):
            merged.setdefault(record["attempt"], {"outcome": "killed", "ended": None, "seconds": None}).update(record)
    for number, record in merged.items():
        if (began := _began.get((work, number))) is not None:
            record |= {"outcome": "running", "seconds": round(time.monotonic() - began, 3)}
    return list(merged.values())


def explain_killed(work: Path, *, on_mac: bool = sys.platform == "darwin") -> str | None:
    """Return what probably ended the last execution and what helps; None: it recorded its end, or there was none.

    Metal aborts a process, without a traceback, if memory is exhausted or, while the display is on, if a command takes
    too long (github.com/ml-explore/mlx/issues/3267).
    """
    if (read(work) or [{}])[-1].get("outcome") != "killed":
        return None
    tokens = None
    with suppress(OSError):
        tokens = (Records.parse((work / "ckpt" / "derived.json").read_bytes()) or {}).get("micro_batch_tokens")
    smaller = f"machine.device_batch_tokens={tokens // 2}" if isinstance(tokens, int) else "smaller batches"
    if on_mac:
        how = "macOS ends programs that exhaust the memory or whose GPU commands take too long while the display is on"
        return f"{how}. If it happens again: {smaller}, display off, or AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1"
    return f"probably killed, maybe by the out-of-memory killer (see dmesg). If it happens again: {smaller}"


def failure(work: Path) -> str | None:
    """Return the error of the last execution if it failed, else None."""
    last = (read(work) or [{}])[-1]
    return str(last["error"]) if last.get("outcome") == "failed" else None


def has_saved(work: Path) -> bool:
    """Return whether a step has saved a state in its work folder, besides records of its progress."""
    return any(name != "records" for name in list_folder(work / "ckpt"))
