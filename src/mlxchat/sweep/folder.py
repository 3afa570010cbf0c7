"""The folder of a sweep: what its processes tell each other, and what is left for people.

sweep.json     the jobs, and what was computed for all of them
rows/<n>.json  the result of a job, written by whichever process ran it; <n>.begun: it was taken out of its queue
sweep.lock     held as long as somebody waits for the jobs
stop           somebody asked for an end: no further job starts
table.*        at the end; the rows are in it and go
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from mlxchat.runner.secrets import redact
from mlxchat.runner.store import MEASURED, Manifest, Store

Row = dict[str, Any]
"""job, overrides (key → value), status, metrics (step.metric → value), seconds; error and run, where there are any."""


class SweepFolder:
    """What is written in a sweep's folder; each file whole or not at all."""

    def __init__(self, path: Path) -> None:
        """Use a folder, which need not be there yet."""
        self.path = path

    @property
    def lock(self) -> Path:
        """Return the lock file that the sweep's own process holds."""
        return self.path / "sweep.lock"

    def prepare(self, state: dict[str, Any]) -> None:
        """Make the folder, and tell the jobs' processes about the sweep."""
        (self.path / "rows").mkdir(parents=True, exist_ok=True)
        self.write_state(state)

    def write_state(self, state: dict[str, Any]) -> None:
        """Replace sweep.json."""
        _write(self.path / "sweep.json", state)

    def state(self) -> dict[str, Any]:
        """Return sweep.json."""
        state: dict[str, Any] = json.loads((self.path / "sweep.json").read_text(encoding="utf-8"))
        return state

    def add_row(self, row: Row) -> None:
        """Keep the result of a job."""
        _write(self.path / "rows" / f"{row['job']}.json", row)

    def begin(self, number: int) -> None:
        """Note that a job has begun, on whichever machine."""
        (self.path / "rows" / f"{number}.begun").touch()

    def has_begun(self, number: int) -> bool:
        """Tell whether a job has begun."""
        return (self.path / "rows" / f"{number}.begun").exists()

    def rows(self) -> dict[int, Row]:
        """Return job → its result, of those that have one."""
        found = {}
        for path in (self.path / "rows").glob("[0-9]*.json"):
            found[int(path.stem)] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def ask_to_stop(self, why: str, signal_number: int) -> None:
        """Let no further job start, and have those that run stop where they can continue; the first to ask counts."""
        if not self.stop():
            _write(self.path / "stop", {"why": why, "signal": signal_number})

    def stop(self) -> dict[str, Any] | None:
        """Return why there shall be an end, or None."""
        try:
            request: dict[str, Any] = json.loads((self.path / "stop").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return request

    def tidy(self) -> None:
        """Remove what only processes needed, and the empty folders that Hydra makes for its jobs."""
        shutil.rmtree(self.path / "rows", ignore_errors=True)
        (self.path / "stop").unlink(missing_ok=True)
        self.lock.unlink(missing_ok=True)
        for job in self.path.glob("[0-9]*"):
            if job.is_dir() and not any(job.iterdir()):
                job.rmdir()


def metrics_of(rids: dict[str, str], store: Store, metric: str | None = None) -> dict[str, float]:
    """Return step.metric → value for the columns of a table.

    Args:
        rids: step → id.
        store: where the steps' artifacts are.
        metric: STEP.METRIC of sweep.metric, shown besides what every table has.
    """
    store.forget()
    found = {}
    for step, rid in rids.items():
        manifest = store.read(rid)
        recorded = {} if manifest is None else recorded_numbers(manifest)
        for key, value in recorded.items():
            if f"{step}.{key}" == metric:
                found[metric] = float(f"{value:.6g}")
            elif key in _SHOWN:
                found[f"{step}.{key}"] = round(value, 4)
    return found


def recorded_numbers(manifest: Manifest) -> dict[str, float]:
    """Return all numbers that a step recorded, the speeds that manifests keep apart included."""
    apart = {key: manifest.get(key) for key in MEASURED}
    return {key: value for key, value in {**manifest["metrics"], **apart}.items() if isinstance(value, int | float)}


_SHOWN = ("val_bpb", "val_loss", "core", "mean_centered", "chatcore", "pass_at_1")
"""What the table of every sweep shows of each step."""


def _write(path: Path, content: Any) -> None:
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(json.dumps(redact(content), indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
