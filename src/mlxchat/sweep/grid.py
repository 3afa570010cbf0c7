"""Sweeps and Hydra's own options: `-m`, `--cfg`, `--info`, completion. Plain runs do not come this way."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from mlxchat.compose import Composed, compose_config, register_schema, to_typed
from mlxchat.errors import ConfigError, Interrupted, MlxchatError
from mlxchat.runner.store import Store

Row = dict[str, Any]


def run_with_hydra(arguments: list[str]) -> int:
    """Hand a command line to Hydra; return 1 if a job of a sweep failed, else 0.

    Raises:
        ConfigError: the composition is wrong.
        Interrupted: a signal stopped a job; no further one is started.
    """
    for overrides in _single_values(arguments):
        compose_config(overrides)
    register_schema()
    # Otherwise Hydra prints its own errors and exits with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    rows: list[Row] = []
    folder: list[Path] = []
    stopped: list[Interrupted] = []

    @hydra.main(version_base="1.3", config_path="pkg://mlxchat.conf", config_name="config")
    def run_job(composed: DictConfig) -> None:
        settings = HydraConfig.get()
        folder[:] = [Path(settings.sweep.dir)]
        overrides = [str(item) for item in settings.overrides.task]
        if stopped:  # Hydra's launcher goes on to the next job whatever this one raises
            return
        try:
            rows.append(_run_job(composed, overrides, settings))
        except Interrupted as stop:
            stopped.append(stop)

    argv, sys.argv = sys.argv, ["mlxchat", *arguments]
    try:
        run_job()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    finally:
        sys.argv = argv
    if rows and not stopped:
        _write_table(rows, folder[0])
    if stopped:
        raise stopped[0]
    return int(any(row["status"] != "done" for row in rows))


def _single_values(arguments: list[str]) -> Iterator[list[str]]:
    """Yield plain overrides that together have every value of a sweep once, so that mistakes are found beforehand."""
    overrides, queue = [], list(arguments)
    while queue:
        argument = queue.pop(0)
        if argument in _OPTIONS_WITH_VALUE:
            queue = queue[1:]
        elif not argument.startswith("-"):
            overrides.append(argument)
    alternatives: list[list[str]] = []
    for override in overrides:
        try:
            parsed = OverridesParser.create().parse_override(override)
            sweeps = parsed.is_sweep_override() and parsed.is_choice_sweep()
        except HydraException:
            sweeps = False
        key = override.partition("=")[0]
        alternatives.append([f"{key}={value}" for value in parsed.sweep_string_iterator()] if sweeps else [override])
    if any("--config-dir" in argument or "-cd" in argument for argument in arguments):
        return  # names from the user's own folders are Hydra's to check
    first = [values[0] for values in alternatives]
    yield first
    for place, values in enumerate(alternatives):
        for value in values[1:]:
            yield [*first[:place], value, *first[place + 1 :]]


_OPTIONS_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--config-name", "-cn", "--info", "-i")


def _run_job(composed: DictConfig, overrides: list[str], settings: Any) -> Row:
    """Run one job of a sweep; a failure is a row of the table and does not keep the others from running."""
    from mlxchat.commands.run import plan_of, run_pipeline

    varied = " ".join(overrides)
    print(f"\n── job {settings.job.num}: {varied}", flush=True)
    row: Row = {"job": settings.job.num, "overrides": varied, "status": "done"}
    try:
        choices = {str(group): str(option) for group, option in settings.runtime.choices.items()}
        config = to_typed(composed)
        run_pipeline(Composed(config, overrides, choices))
    except Interrupted:
        raise
    except MlxchatError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return row | {"status": "failed", "error": str(error).splitlines()[0]}
    store = Store(Path(config.outputs))
    for step in plan_of(config, store):
        manifest = store.read(step.rid)
        shown = {key: value for key, value in manifest["metrics"].items() if key in _SHOWN} if manifest else {}
        row |= {f"{step.name}.{key}": round(value, 4) for key, value in shown.items()}
    return row


_SHOWN = ("val_bpb", "val_loss", "mean_centered", "pass_at_1")


def _write_table(rows: list[Row], folder: Path) -> None:
    """Write table.md, table.csv and table.json of a sweep and print it."""
    folder.mkdir(parents=True, exist_ok=True)
    for job in folder.glob("[0-9]*"):
        if job.is_dir() and not any(job.iterdir()):
            job.rmdir()  # Hydra makes one per job; the runs are under outputs/runs
    every = set.intersection(*(set(row["overrides"].split()) for row in rows)) if len(rows) > 1 else set()
    for row in rows:  # what all jobs share says nothing about any of them
        row["overrides"] = " ".join(override for override in row["overrides"].split() if override not in every)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([str(row.get(key, "")) for key in columns] for row in rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    (folder / "table.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    print(f"\n{table}\n\nsweep: {folder / 'table.md'}")
