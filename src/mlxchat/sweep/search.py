"""`mlxchat sweep=tpe`: a search whose every trial is chosen by the results so far; killed at any moment, it goes on."""

from __future__ import annotations

import importlib.util
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxchat.compose import Composed, compose_config, split_config_dirs
from mlxchat.errors import ConfigError, Interrupted, MlxchatError
from mlxchat.overrides import implied_experiment
from mlxchat.runner import locks
from mlxchat.runner.plan import PlannedStep, entries_of, flatten_config
from mlxchat.runner.progress import format_number
from mlxchat.runner.secrets import redact
from mlxchat.runner.store import Store
from mlxchat.sweep.expand import split_hydras
from mlxchat.sweep.folder import SweepFolder, metrics_of, recorded_numbers
from mlxchat.sweep.journal import Journal, Trial
from mlxchat.sweep.metrics import find_metric
from mlxchat.sweep.space import Space, describe, read_space
from mlxchat.sweep.table import write_results
from mlxchat.sweep.worker import is_finished, rids_of


@dataclass(kw_only=True)
class Search:
    """What a search needs to know for each of its trials."""

    base: Composed
    """The configuration without the settings that vary."""
    plan: list[PlannedStep]
    """Its plan."""
    fixed: list[str]
    """Overrides of every trial."""
    config_dirs: list[str]
    space: Space
    step: str
    metric: str
    less_is_better: bool

    @property
    def folder(self) -> Path:
        """outputs/multirun/<sweep.name>, or <name of the run>-search, so that the run's name means its runs alone."""
        config = self.base.config
        folders = Path(config.outputs) / "multirun"
        if config.sweep.name is None and (folders / config.name / "trials.jsonl").exists():
            return folders / config.name  # of an earlier version, which named it so
        return folders / (config.sweep.name or f"{config.name}-search")

    def overrides(self, trial: Trial) -> list[str]:
        """Return the command line of a trial."""
        return [*self.fixed, *(f"{key}={value}" for key, value in trial.values.items())]


def run_search(arguments: list[str]) -> int:
    """Run the trials that are not done yet; return 1 if none of all has succeeded, else 0.

    Args:
        arguments: those of the command line, with `sweep=tpe`.

    Raises:
        ConfigError: something is wrong with the configuration or the space, or Optuna is not installed.
        Interrupted: a signal arrived; the same command goes on.
    """
    overrides, config_dirs = split_config_dirs(arguments)
    search = _prepare(overrides, config_dirs)
    if search is None:  # sweep=none
        from mlxchat.pipeline_run import run_pipeline

        run_pipeline(compose_config(overrides, config_dirs))
        return 0
    Store(Path(search.base.config.outputs)).prepare()
    search.folder.mkdir(parents=True, exist_ok=True)

    def tell_waiting(owner: dict[str, Any]) -> None:
        who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
        print(f"{who} is at this search ({search.folder}); waiting", flush=True)

    with locks.hold(search.folder / "search.lock", {"search": search.folder.name}, tell_waiting):
        journal = Journal(search.folder / "trials.jsonl")
        journal.begin(redact(_study(search)))
        goal = f"the {'smallest' if search.less_is_better else 'largest'} {search.step}.{search.metric}"
        print(f"{search.base.config.sweep.trials} trials for {goal}; their results: {journal.path}", flush=True)
        try:
            _run_trials(search, journal)
        except Interrupted as stop:
            told = sum(trial.status != "asked" for trial in journal.trials)
            raise Interrupted(
                f"{stop}\n{told} of {search.base.config.sweep.trials} trials have results.", stop.exit_code - 128
            ) from None
        return _conclude(search, journal)


def _prepare(overrides: list[str], config_dirs: list[str]) -> Search | None:
    """Return the search, checked as far as it can be before it runs; None if the configuration is of no search."""
    hydras = split_hydras(overrides)[1]
    if any(item.lstrip("+").startswith(("hydra/launcher", "hydra/sweeper", "hydra.launcher")) for item in hydras):
        raise ConfigError(f"{hydras[0]}: a search runs its trials one after the other in this process")
    overrides = [*implied_experiment(overrides), *overrides]  # also where only trials choose a model
    plain = [item for item in overrides if not _varies(item)]
    base = compose_config(plain, config_dirs)
    sweep = base.config.sweep
    if sweep.kind == "none":
        return None
    if implied := implied_experiment([*overrides, *(f"{key}={value}" for key, value in sweep.space.items())]):
        overrides = [*implied, *overrides]
        base = compose_config([*implied, *plain], config_dirs)
        sweep = base.config.sweep
    fixed, space = read_space(overrides, sweep.space, config_dirs)
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("sweep=tpe needs Optuna: pip install 'mlxchat[search]' (or optuna)")
    assert sweep.metric is not None
    step, _, metric = sweep.metric.rpartition(".")
    if base.config.targets is None and step in base.config.pipeline:  # what comes after the metric is not needed
        base = replace(base, config=replace(base.config, targets=[step]))
    plan = _plan(base)
    direction = find_metric(sweep.metric, sweep.direction, [(plan, base.config)])
    search = Search(
        base=base, plan=plan, fixed=fixed, config_dirs=config_dirs, space=space, step=step, metric=metric,
        less_is_better=direction == "minimize",
    )  # fmt: skip
    problems: list[str] = []
    for key, dimension in space.items():
        for value in dimension.examples():
            try:
                compose_config([*fixed, f"{key}={value}"], config_dirs)
            except MlxchatError as error:
                problems += str(error).splitlines()
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return search


def _varies(item: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(item).is_sweep_override()
    except HydraException:
        return False


def _plan(composed: Composed) -> list[PlannedStep]:
    from mlxchat.pipeline_run import plan_to_run

    return plan_to_run(composed.config, Store(Path(composed.config.outputs)))


def _study(search: Search) -> dict[str, Any]:
    """Return what makes two searches the same: what is looked for, where, and everything that does not vary."""
    sweep = search.base.config.sweep
    fixed = {}
    for step in search.plan:
        for key, value in flatten_config(step.identity).items():
            if key not in search.space:
                fixed[f"{step.name}: {key}"] = value
    return {
        "metric": f"{search.step}.{search.metric}",
        "less_is_better": search.less_is_better,
        "seed": sweep.seed,
        "random_trials": sweep.random_trials,
        "space": {" " + key: words for key, words in describe(search.space).items()},
        "fixed": fixed,
    }


def choose(
    space: Space, told: Sequence[Trial], *, number: int, seed: int, random_trials: int, less_is_better: bool
) -> dict[str, Any]:
    """Return what a trial is to try: key → value.

    The choice depends on the results so far, the seed and the trial's number alone, so that a search that was
    interrupted makes the same ones as one that was not.

    Args:
        space: what may be chosen.
        told: trials with results.
        number: of the trial, from 1.
        seed: of the search.
        random_trials: results before they begin to decide.
        less_is_better: whether small values are good ones.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {key: dimension.distribution() for key, dimension in space.items()}
    sampler = optuna.samplers.TPESampler(seed=(seed * 1_000_003 + number) % 2**32, n_startup_trials=random_trials)
    study = optuna.create_study(direction="minimize" if less_is_better else "maximize", sampler=sampler)
    for trial in told:
        done = trial.status == "done"
        study.add_trial(
            optuna.trial.create_trial(
                params=trial.values, distributions=distributions, value=trial.value if done else None,
                state=optuna.trial.TrialState.COMPLETE if done else optuna.trial.TrialState.FAIL,
            )
        )  # fmt: skip
    return dict(study.ask(distributions).params)


def _run_trials(search: Search, journal: Journal) -> None:
    config = search.base.config
    while True:
        trial = journal.waiting
        if trial is None:
            if len(journal.trials) >= config.sweep.trials:
                return
            trial = journal.ask(
                choose(
                    search.space, journal.trials, number=len(journal.trials) + 1, seed=config.sweep.seed,
                    random_trials=config.sweep.random_trials, less_is_better=search.less_is_better,
                )
            )  # fmt: skip
        print(f"\n── {_title(search, trial)}", flush=True)
        value, row = _run_trial(search, trial)
        journal.tell(trial, value, row)
        _remember(search, journal)
        said = f"failed: {row['error']}" if value is None else f"{search.step}.{search.metric} {format_number(value)}"
        print(f"── {_title(search, trial)} {said}{_best_so_far(search, journal)}", flush=True)
        if value is None and config.fail_fast:
            return


def _run_trial(search: Search, trial: Trial) -> tuple[float | None, dict[str, Any]]:
    """Return the metric, None if there is none, and what the journal keeps besides.

    Raises:
        ConfigError: the step has no such metric, and so no trial has it.
        Interrupted: a signal arrived.
    """
    from mlxchat.pipeline_run import run_pipeline

    row: dict[str, Any] = {"metrics": {}}
    try:
        composed = compose_config(search.overrides(trial), search.config_dirs)
        composed = replace(composed, config=replace(composed.config, targets=search.base.config.targets))
        plan = _plan(composed)
        row["steps"] = entries_of(plan)
        if not is_finished(plan):
            place = run_pipeline(composed)
            row["run"] = place.name if place else None
    except Interrupted:
        raise
    except MlxchatError as error:
        return None, row | {"error": str(error).splitlines()[0]}
    store = Store(Path(composed.config.outputs))
    rids = rids_of(plan)
    manifest = store.read(rids[search.step]) if search.step in rids else None
    if manifest is None:
        return None, row | {"error": f"there is no step {search.step}"}
    recorded = recorded_numbers(manifest)
    if search.metric not in recorded:  # hooks that leave no trace in the id may have been off when it was made
        raise ConfigError(
            f"sweep.metric: the artifact of {search.step}, made before, has no {search.metric}. To make it again: "
            f"force=[{search.step}]"
        )
    value = float(recorded[search.metric])
    row["metrics"] = metrics_of(rids, store, f"{search.step}.{search.metric}")
    if not math.isfinite(value):
        return None, row | {"error": f"{search.step}.{search.metric} is {value}", "metrics": {}}
    return value, row


def _remember(search: Search, journal: Journal) -> None:
    """Write which artifacts each trial has, for `compare` and `report`."""
    jobs = {
        trial.number: {
            "overrides": search.overrides(trial), "settings": trial.values, "title": _chosen(trial),
            "steps": (trial.row or {}).get("steps", []),
        }
        for trial in journal.trials
    }  # fmt: skip
    SweepFolder(search.folder).write_state({"jobs": jobs})


def _conclude(search: Search, journal: Journal) -> int:
    """Write the table, say which trial was the best and how to run it."""
    rows = [
        {"job": trial.number, "overrides": trial.values, "status": trial.status, "metrics": {}, **(trial.row or {})}
        for trial in journal.trials
    ]
    metric = f"{search.step}.{search.metric}"
    write_results(rows, search.folder, metric=metric, less_is_better=search.less_is_better, unit="trial")
    _remember(search, journal)
    print(f"side by side: mlxchat compare {search.folder.name}; mlxchat report {search.folder.name}")
    best = _best(search, journal)
    if best is None:
        print("no trial has succeeded")
        return 1
    command = [item for item in search.overrides(best) if item.partition("=")[0].split(".")[0] != "sweep"]
    dirs = [argument for folder in search.config_dirs for argument in ("--config-dir", folder)]
    print(f"best: {_title(search, best)}: {metric} {best.value:.6g}")
    print(redact(f"its command: mlxchat {shlex.join([*dirs, *command])}"), flush=True)
    return 0


def _best(search: Search, journal: Journal) -> Trial | None:
    done = [trial for trial in journal.trials if trial.value is not None]
    sign = 1 if search.less_is_better else -1
    return min(done, key=lambda trial: sign * (trial.value or 0.0), default=None)


def _best_so_far(search: Search, journal: Journal) -> str:
    best = _best(search, journal)
    return f" (best so far: trial {best.number}, {format_number(best.value or 0.0)})" if best else ""


def _title(search: Search, trial: Trial) -> str:
    return redact(f"trial {trial.number}/{search.base.config.sweep.trials} {_chosen(trial)}")


def _chosen(trial: Trial) -> str:
    """Return the trial's settings for people."""
    return " ".join(
        f"{key}={format_number(value) if isinstance(value, float) else value}" for key, value in trial.values.items()
    )
