"""Differences of two artifacts in everything, and of several runs in settings and metrics."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxchat.errors import ConfigError, StoreError, suggest
from mlxchat.store.fingerprint import changes, flatten
from mlxchat.store.manifest import Manifest
from mlxchat.store.naming import LATEST, called, experiment_of, latest
from mlxchat.store.store import Store

Change = tuple[Any, Any]
_EXECUTION = ("seconds", "tokens_per_second", "data_wait_frac", "peak_memory_bytes")


def differences(old: Manifest, new: Manifest) -> dict[str, dict[str, Change]]:
    """Return section → key → (old, new) of all differences; sections without any are empty.

    Sections: config (settings that are part of the id), machine (settings that are not), inputs, code, metrics,
    execution, environment, contents.
    """
    before, after = _sections(old), _sections(new)
    return {section: changes(before[section], after[section]) for section in before}


def _sections(manifest: Manifest) -> dict[str, dict[str, Any]]:
    part = {key: manifest.get(key) or {} for key in (
        "full_config", "config", "excluded", "inputs", "pins", "git", "code", "metrics", "versions", "device",
    )}  # fmt: skip
    # The full configuration includes fields that are not part of the identity. There `seed` may be the data's.
    seeds = {key: manifest[key] for key in ("seed", "data_seed") if key in manifest}
    inputs = {role: made.get("artifact", made["rid"]) for role, made in part["inputs"].items()}
    git = {"git.commit": str(part["git"].get("commit"))[:12], "git.dirty": part["git"].get("dirty")}
    stage = {"stage": manifest.get("stage"), "version": manifest.get("version")}
    host = {"host": (manifest.get("attempts") or [{}])[-1].get("host")}
    return {
        "config": flatten(part["full_config"]) | flatten(part["config"]) | seeds,
        "machine": flatten(part["excluded"]),
        "inputs": inputs | {f"pin {name}": value for name, value in part["pins"].items()},
        "code": stage | flatten(part["code"]) | git,
        "metrics": flatten(part["metrics"]),
        "execution": {key: manifest.get(key) for key in _EXECUTION},
        "environment": flatten(part["versions"]) | flatten(part["device"], "device.") | host,
        "contents": {file["path"]: file["sha256"][:12] for file in manifest.get("outputs", ())},
    }


Row = dict[str, Any]
BestOf = Callable[[str, str], Callable[..., float] | None]
Plan = tuple[str, list[dict[str, Any]]]
"""The name of a run or of a job of a sweep, and the steps of its plan: step, key, rid and more."""


def find_runs(store: Store, names: list[str]) -> list[Plan]:
    """Return the named runs, oldest first, then the jobs with artifacts of the named sweeps; without names, all runs.

    A name is that of a run's folder, else its last part (smoke: all runs and jobs called so), else that of a sweep;
    multirun/NAME is always the sweep.
    """
    every = {path.parent.name: path for path in sorted((store.outputs / "runs").glob("*/plan.json"))}
    runs = set[str]() if names else {*every}
    jobs: list[Plan] = []
    for name in names:
        last = latest(store) if name == LATEST else name.rstrip("/").rpartition("/")[2]
        matching = {last} & every.keys() or {run for run in every if last in (called(run), experiment_of(run))}
        if matching and "multirun/" not in name:
            runs |= matching
        elif (sweep := find_sweep(store.outputs, last)) is not None:
            found = _read(sweep / "sweep.json")["jobs"].values()
            jobs += [(job["title"], job["steps"]) for job in found if job["steps"]]
        else:
            raise ConfigError(f'"{name}" is no run or sweep in {store.outputs}.{suggest(name, every)}')
    return [*((run, _read(every[run])["steps"]) for run in every if run in runs), *jobs]


def find_sweep(outputs: Path, name: str) -> Path | None:
    """Return the folder of a sweep by its name, or the last one whose name ends so: town-sweep."""
    sweeps = {path.parent.name: path.parent for path in sorted((outputs / "multirun").glob("*/sweep.json"))}
    called_so = [place for folder, place in sweeps.items() if called(folder) == name]
    return sweeps.get(name) or next(reversed(called_so), None)


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read ({error})") from None
    return record


def rows_of_runs(store: Store, runs: list[Plan]) -> list[Row]:
    """Return a row per run: `name`, `config` and `metrics` of its finished steps.

    `steps` has the stage of each step, `scores` the artifact of each evaluation by what its metrics' names begin with.
    """
    rows = []
    for name, steps in runs:
        row: Row = {"name": name, "config": {}, "metrics": {}, "steps": {}, "scores": {}}
        for step in steps:
            manifest = None
            with suppress(StoreError):  # a damaged one
                manifest = store.made(step.get("key", ""), step["rid"])
            if manifest is None:
                continue
            row["steps"][step["step"]] = manifest["stage"]
            if manifest["kind"] == "scores":
                row["scores"][f"{step['step']}."] = manifest["name"]
            row["config"] |= flatten(manifest["config"])
            row["metrics"] |= {f"{step['step']}.{key}": value for key, value in manifest["metrics"].items()}
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Table:
    """Runs side by side."""

    rows: list[Row]  # one per run, sorted: `name`, settings and metrics
    settings: list[str]  # those that differ among the runs that have their section, as only runs with RL have rl
    metrics: list[str]
    equal: list[str]  # metrics that are equal in all of several runs that have them, or that one of several runs has


def make_table(rows: list[Row], sort: str | None, best_of: BestOf = lambda stage, metric: None) -> Table:
    """Return a table of the settings that differ and of the metrics.

    `sort` is a setting (smallest first) or a metric (best first); a leading - reverses; None keeps the order.
    `best_of` returns min or max for (stage, metric), or None.
    """

    def values(key: str) -> list[str]:
        section = key.partition(".")[0]
        having = [row["config"] for row in rows if any(each.partition(".")[0] == section for each in row["config"])]
        return [json.dumps(config.get(key), sort_keys=True) for config in having]

    keys = dict.fromkeys(key for row in rows for key in row["config"])
    settings = [key for key in keys if len({*values(key)}) > 1]
    metrics = list(dict.fromkeys(key for row in rows for key in row["metrics"]))
    equal = [key for key in metrics if len({row["metrics"][key] for row in rows if key in row["metrics"]}) == 1]
    if sort:
        rows = _sorted(rows, sort, settings, metrics, best_of)
    chosen = [{key: row["config"].get(key) for key in settings} for row in rows]
    flat = [{"name": row["name"], **own, **row["metrics"]} for row, own in zip(rows, chosen, strict=True)]
    return Table(flat, settings, metrics, equal if len(rows) > 1 else [])


def _sorted(rows: list[Row], sort: str, settings: list[str], metrics: list[str], best_of: BestOf) -> list[Row]:
    """Return the rows in the order of a column, those without a value last."""
    column, known = sort.removeprefix("-"), [*settings, *metrics]
    matching = [name for name in known if name == column] or [name for name in known if name.endswith(f".{column}")]
    if len(matching) != 1:
        found = f"may be {', '.join(matching)}" if matching else f"is not in this table: {', '.join(known)}"
        raise ConfigError(f'--sort: "{column}" {found}.{suggest(column, known)}')
    (name,) = matching
    of = "metrics" if name in metrics else "config"
    step, _, metric = name.partition(".")
    is_maximised = of == "metrics" and max in [best_of(row["steps"].get(step, ""), metric) for row in rows]
    have = [row for row in rows if row[of].get(name) is not None]
    has_numbers = all(isinstance(row[of][name], int | float) for row in have)
    is_reversed = sort.startswith("-") ^ is_maximised
    have.sort(key=lambda row: row[of][name] if has_numbers else str(row[of][name]), reverse=is_reversed)
    return [*have, *(row for row in rows if row[of].get(name) is None)]
