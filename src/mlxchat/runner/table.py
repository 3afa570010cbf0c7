"""Runs, or artifacts of one step, side by side: only the settings that differ, and the metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxchat.errors import ConfigError, StoreError, suggest
from mlxchat.runner.catalog import read_catalog
from mlxchat.runner.comparing import flatten
from mlxchat.runner.store import Manifest, Store, read_manifest

Row = dict[str, Any]


def run_folders(store: Store, names: list[str]) -> list[Path]:
    """Return the folders of runs, or of all jobs of a sweep, in order of time; without names, of all runs.

    Raises:
        ConfigError: a name is that of no run and of no sweep, or of several.
    """
    base = store.outputs / "runs"
    every = sorted(path for path in base.iterdir() if (path / "plan.json").exists()) if base.is_dir() else []
    if not names:
        return every
    found: dict[Path, None] = {}
    for name in names:
        sweep = store.outputs / "multirun" / name.rstrip("/").rpartition("/")[2]
        table = sweep / "table.json"
        if table.exists():
            rows = json.loads(table.read_text(encoding="utf-8"))
            jobs = {str(row["run"]) for row in rows if row.get("run")}
            found.update(dict.fromkeys(path for path in every if path.name in jobs))
            continue
        matching = [path for path in every if path.name == name] or [
            path for path in every if path.name.startswith(name) or path.name.endswith(f"-{name}")
        ]
        if not matching:
            known = [path.name for path in every]
            raise ConfigError(f'"{name}" is no run and no sweep in {store.outputs}.{suggest(name, known)}')
        found.update(dict.fromkeys(matching))
    return sorted(found)


def rows_of_runs(store: Store, folders: list[Path]) -> list[Row]:
    """Return a row per run: `name`, and config and metrics of all its steps that are there."""
    rows = []
    for folder in folders:
        try:
            steps = json.loads((folder / "plan.json").read_text(encoding="utf-8"))["steps"]
        except (OSError, ValueError, KeyError):
            continue
        config: Row = {}
        metrics: Row = {}
        for step in steps:
            place = store.own_folder(step["rid"])
            if place is None:
                continue
            try:
                manifest = store.manifest_of(place)
            except StoreError:
                continue
            config |= settings_of(manifest)
            metrics |= {f"{step['step']}.{key}": value for key, value in manifest["metrics"].items()}
        rows.append({"name": folder.name, "config": config, "metrics": metrics})
    return rows


def rows_of_step(store: Store, step: str) -> list[Row]:
    """Return a row per artifact of a step, in order of time.

    Raises:
        ConfigError: there is none.
    """
    summaries = [summary for summary in read_catalog(store) if "damaged" not in summary]
    chosen = [summary for summary in summaries if step in (summary["step"], summary["stage"])]
    if not chosen:
        known = sorted({str(summary["step"]) for summary in summaries})
        raise ConfigError(
            f'there is no artifact of step "{step}": {", ".join(known) or "none at all"}.{suggest(step, known)}'
        )
    rows = []
    for summary in chosen:
        manifest = read_manifest(store.outputs / "store" / summary["folder"])
        made = {f"input {role}": one.get("artifact") for role, one in manifest["inputs"].items()}
        config = {**settings_of(manifest), **made}
        rows.append({"name": summary["folder"], "config": config, "metrics": dict(manifest["metrics"])})
    return rows


def settings_of(manifest: Manifest) -> dict[str, Any]:
    """Return the settings that an artifact's id covers, as dotted key → value."""
    return flatten(manifest["config"])


def make_table(rows: list[Row], sort: str | None) -> tuple[list[str], list[Row]]:
    """Return the columns (name, differing settings, metrics) and a flat row for each, sorted.

    Args:
        rows: with `name`, `config` and `metrics`.
        sort: a column, with a leading - for descending; None: as given.

    Raises:
        ConfigError: there is no such column.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row["config"]))
    texts = {key: {json.dumps(row["config"].get(key), sort_keys=True) for row in rows} for key in keys}
    differing = [key for key in keys if len(texts[key]) > 1]
    metrics = list(dict.fromkeys(key for row in rows for key in row["metrics"]))
    flat = [
        {"name": row["name"], **{key: row["config"].get(key) for key in differing}, **row["metrics"]} for row in rows
    ]
    columns = ["name", *differing, *metrics]
    if sort:
        descending, column = sort.startswith("-"), sort.removeprefix("-")
        matching = [name for name in columns if name == column] or [
            name for name in columns if name.endswith(f".{column}")
        ]
        if len(matching) != 1:
            found = f"may be {', '.join(matching)}" if matching else f"is no column: {', '.join(columns)}"
            raise ConfigError(f'--sort: "{column}" {found}.{suggest(column, columns)}')
        have = [row for row in flat if row.get(matching[0]) is not None]
        lack = [row for row in flat if row.get(matching[0]) is None]
        flat = [*sorted(have, key=lambda row: _order(row[matching[0]]), reverse=descending), *lack]
    return columns, flat


def _order(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return (not number, float(value) if number else 0.0, "" if number else str(value))


def is_number(value: Any) -> bool:
    """Tell whether a cell is a number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def numeric(rows: list[Mapping[str, Any]], column: str) -> bool:
    """Tell whether all cells of a column that are filled are numbers."""
    cells = [row.get(column) for row in rows if row.get(column) is not None]
    return bool(cells) and all(map(is_number, cells))
