"""mlxchat status: what runs, what failed, what is done and what is left over in an outputs folder."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxchat.commands.arguments import make_naming_parser, outputs_folder, take_names
from mlxchat.commands.columns import aligned, print_json, when
from mlxchat.config.wording import format_bytes, format_count, format_seconds
from mlxchat.errors import StoreError, visible
from mlxchat.store import attempts, locks
from mlxchat.store.naming import Run, latest, links, meaning
from mlxchat.store.store import Store, read_manifest

_LOG_LINES = 3
_TAIL_BYTES = 65536

Row = dict[str, Any]


def main(arguments: list[str]) -> int:
    """Print the work in progress, what failed, and the steps of a run."""
    what = "Show what is running, failed and left over, and what is done in a run (default: the latest)."
    parser = make_naming_parser("status", what, "RUN")
    parser.add_argument("--json", action="store_true", help="one JSON object for programs")
    options = parser.parse_intermixed_args(arguments)
    names, settings = take_names(options.settings, "status", 0, 1, "[RUN]")
    store = Store(outputs_folder(settings))
    run = _run_named(store, names[0]) if names else latest(store)
    work = [describe_work(store, folder) for folder in _folders(store.outputs / "work")]
    done = [_describe_done(step, place) for step, place in links(store, run).items()]
    done.sort(key=lambda row: str(row.get("published", "")))
    if options.json:
        print_json({"outputs": str(store.outputs), "work": work, "latest": latest(store), "run": run, "done": done})
        return 0
    for title, chosen in (("running", "running"), ("failed", "failed"), ("left over", "")):
        rows = [
            row for row in work if row["state"] == chosen or (not chosen and row["state"] not in ("running", "failed"))
        ]
        if rows:
            print(title)
        for row in rows:
            print(visible("\n".join(_lines_of(row))))
    if done:
        print(f"done ({'latest run: ' * (run == latest(store))}{run})")
        print(aligned([_cells(row) for row in done], right=(2, 3), indent="  "))
    if not done and not work:
        print(f"{store.outputs} holds nothing yet: run mlxchat first")
    return 0


def _run_named(store: Store, name: str) -> str:
    """Return the run that a name means.

    Raises:
        StoreError: it means none.
    """
    meant = meaning(store, name)
    if not isinstance(meant, Run):
        raise StoreError(f'"{name}" is {meant.place.name}, no run. See: mlxchat show {name}')
    return meant.name


def describe_work(store: Store, folder: Path) -> Row:
    """Return who makes a step now, or how its last attempt ended, and how far it got."""
    key = folder.name
    executions = attempts.read(folder)
    last = executions[-1] if executions else {}
    held = locks.is_held(store.lock(key))
    owner = locks.read_owner(store.lock(key)) if held else {}
    latest = _last_record(folder / "ckpt" / "records" / "metrics.jsonl")
    run = owner.get("run") or last.get("run")
    state = "running" if held else str(last.get("outcome", "never started"))
    log = store.outputs / "runs" / str(run) / f"{last.get('step')}-error.log"
    return {
        "state": state, "step": owner.get("step") or last.get("step") or key[:16], "key": key, "run": run,
        "pid": owner.get("pid") or last.get("pid"), "host": owner.get("host") or last.get("host"),
        "started": last.get("started"), "ended": last.get("ended"), "attempts": len(executions),
        "ranks": _ranks(store, str(run)) if held else None,
        "iteration": latest.get("iteration"), "loss": latest.get("loss"),
        "tokens_per_second": latest.get("tokens_per_second"), "error": last.get("error"),
        "command": _command(store, str(last.get("run"))),
        "log": str(log) if log.exists() else None, "log_tail": _tail(log) if state == "failed" else [],
    }  # fmt: skip


def _lines_of(row: Row) -> list[str]:
    """Return the lines about one step's work."""
    at = f" at iteration {row['iteration']}" if row["iteration"] is not None else ""
    speed = f", {format_count(row['tokens_per_second'])} tok/s" if row["tokens_per_second"] else ""
    if row["state"] == "running":
        since = f", since {when(row['started'])}" if row["started"] else ""
        ranks = row["ranks"] or {}
        hosts = list(dict.fromkeys(ranks.get("hosts", ())))
        where = f" on {', '.join(hosts)}" if len(hosts) > 1 else ""
        together = f" with {ranks['size']} ranks ({ranks['backend']}){where}" if ranks else ""
        who = f"running in process {row['pid']} on {row['host']}{together} (run {row['run']}){at}{speed}{since}"
        return [f"  {row['step']:<11} {who}"]
    tries = f", attempt {row['attempts']}" if row["attempts"] > 1 else ""
    error = f": {row['error']}" if row["error"] else ""
    lines = [f"  {row['step']:<11} {row['state']}{at}{tries}{error}"]
    lines += [f"              | {line}" for line in row["log_tail"]]
    if row["log"] and row["state"] == "failed":
        lines.append(f"              whole log: {row['log']}")
    return [*lines, f"              continue: {row['command']}"] if row["command"] else lines


def _describe_done(step: str, place: Path) -> Row:
    try:
        manifest = read_manifest(place)
    except StoreError:
        return {"step": step, "artifact": place.name, "damaged": True}
    size = sum(file["bytes"] for file in manifest["outputs"])
    return {
        "step": step, "artifact": place.name, "rid": manifest["rid"], "bytes": size,
        "seconds": manifest["seconds"], "published": manifest["published"],
    }  # fmt: skip


def _cells(row: Row) -> list[str]:
    if row.get("damaged"):
        return [row["step"], row["artifact"], "-", "-", "damaged: see mlxchat verify"]
    return [
        row["step"], row["artifact"], format_bytes(row["bytes"]), format_seconds(row["seconds"] or 0),
        when(row["published"]),
    ]  # fmt: skip


def _command(store: Store, run: str) -> str | None:
    """Return the command line of a run; None: its record is gone."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((store.outputs / "runs" / run / "plan.json").read_text(encoding="utf-8"))["command"])
    return None


def _ranks(store: Store, run: str) -> Row | None:
    """Return which ranks compute in a run: size, backend, hosts, pids; None: it is one process."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((store.outputs / "runs" / run / "ranks.json").read_text(encoding="utf-8"))
        return {key: found[key] for key in ("size", "backend", "hosts", "pids")}
    return None


def _folders(place: Path) -> list[Path]:
    try:
        return sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []


def _last_record(path: Path) -> Row:
    """Return the last whole record of a file that may be long and is being written."""
    for line in reversed(_end_of(path).split(b"\n")):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            return record
    return {}


def _tail(path: Path) -> list[str]:
    lines = [line.rstrip() for line in _end_of(path).decode(errors="replace").splitlines() if line.strip()]
    return lines[-_LOG_LINES:]


def _end_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            return file.read()
    except OSError:
        return b""
