"""`mlxchat sweep=tpe` and `sweep=halving`: trials chosen by earlier results, in a journal of Optuna.

A choice depends only on the results so far, the seed and the trial's number, and a trial is added to the journal when
it has ended. So a search that was killed at any moment continues with the same trials.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from mlxchat.composition.compose import Composed, compose_config, split_config_dirs
from mlxchat.composition.overrides import implied_experiment
from mlxchat.config.secrets import redact
from mlxchat.config.wording import format_number
from mlxchat.errors import ConfigError, Interrupted, MlxchatError, StoreError
from mlxchat.pipeline import plan_of, plan_to_run, run_pipeline
from mlxchat.runner.plan import PlannedStep, entries_of
from mlxchat.store import locks
from mlxchat.store.crash import crash_point
from mlxchat.store.files import Record, Records
from mlxchat.store.fingerprint import changes, flatten
from mlxchat.store.store import Store
from mlxchat.sweep.results import (
    Row,
    SweepFolder,
    find_metric,
    metrics_of,
    name_best,
    product_of,
    recorded_numbers,
    write_results,
)
from mlxchat.sweep.sweeper import is_finished, listed, parse

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

Space = dict[str, "BaseDistribution"]
Direction = Literal["minimize", "maximize"]
_MOST_SHOWN = 4
_FORMS = (
    "Expected choice(a,b), glob(d*), range(1,9), interval(0.1,1), int(interval(1,8)) or tag(log,interval(0.001,1)), "
    "quoted in the shell"
)


@dataclass(kw_only=True)
class Search:
    """A search: its space, metric and base configuration."""

    base: Composed
    """The configuration without the settings that vary."""
    plan: list[PlannedStep]
    """Plan of the base configuration."""
    fixed: list[str]
    """Overrides of every trial."""
    config_dirs: list[str]
    space: Space
    direction: Direction

    @property
    def target(self) -> str:
        """STEP.METRIC."""
        return str(self.base.config.sweep.metric)

    @property
    def folder(self) -> Path:
        """outputs/multirun/<sweep.name>, or <name of the run>-search, so that the run's name refers to runs only."""
        config = self.base.config
        return Path(config.outputs) / "multirun" / (config.sweep.name or f"{config.name}-search")

    def overrides(self, values: Mapping[str, Any]) -> list[str]:
        """Return the command line of a trial."""
        return [*self.fixed, *(f"{key}={value}" for key, value in values.items())]

    def title(self, number: int, values: Mapping[str, Any]) -> str:
        """Return a trial's number and settings for display."""
        return redact(f"trial {number}/{self.base.config.sweep.trials} {_shown(values)}")


def run_search(arguments: list[str]) -> int:
    """Run the remaining trials; return 1 if none has succeeded, else 0.

    Args:
        arguments: arguments of the command line, with `sweep=tpe` or `sweep=halving`.

    Raises:
        ConfigError: something is wrong with the configuration or the space, or Optuna is not installed.
        Interrupted: a signal arrived; the same command continues.
    """
    overrides, config_dirs = split_config_dirs([item for item in arguments if item not in ("-m", "--multirun")])
    search = _prepare(overrides, config_dirs)
    if search is None:  # sweep=none
        run_pipeline(compose_config(overrides, config_dirs))
        return 0
    Store(Path(search.base.config.outputs)).prepare()
    search.folder.mkdir(parents=True, exist_ok=True)

    def tell_waiting(owner: dict[str, Any]) -> None:
        print(f"{locks.name_process(owner)} runs this search ({search.folder}); waiting", flush=True)

    with locks.hold(search.folder / "search.lock", {"search": search.folder.name}, tell_waiting):
        trials = Trials(search.folder / "journal.log", search.direction)
        trials.begin(redact(_definition(search)))
        sweep = search.base.config.sweep
        goal = f"the {'smallest' if search.direction == 'minimize' else 'largest'} {search.target}"
        print(f"{sweep.trials} trials for {goal}; their results: {trials.path}", flush=True)
        try:
            _run_trials(search, trials)
        except Interrupted as stop:
            raise Interrupted(
                f"{stop}\n{len(trials.rows())} of {sweep.trials} trials have results.", stop.exit_code - 128
            ) from None
        finally:
            _remember(search, trials)
        return _conclude(search, trials)


def _prepare(overrides: list[str], config_dirs: list[str]) -> Search | None:
    """Return the search, checked as far as possible before it runs; None if the configuration has no search."""
    overrides = [*implied_experiment(overrides), *overrides]  # also if only trials choose a model
    plain = [item for item in overrides if not _varies(item)]
    base = compose_config(plain, config_dirs)
    if base.config.sweep.kind == "none":
        return None
    space_of_yaml = base.config.sweep.space
    if implied := implied_experiment([*overrides, *(f"{key}={value}" for key, value in space_of_yaml.items())]):
        overrides = [*implied, *overrides]
        base = compose_config([*implied, *plain], config_dirs)
    sweep = base.config.sweep
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(f"sweep={sweep.kind} needs Optuna: pip install 'mlxchat[search]' (or optuna)")
    fixed, space = read_space(overrides, sweep.space, config_dirs)
    assert sweep.metric is not None
    step, _, metric = sweep.metric.rpartition(".")
    if base.config.targets is None and step in base.config.pipeline:  # steps after the metric's are not needed
        base = replace(base, config=replace(base.config, targets=[step]))
    plan = plan_of(base.config, Store(Path(base.config.outputs)))
    direction = find_metric(sweep.metric, sweep.direction, [plan])
    stage = next(planned.stage for planned in plan if planned.name == step)
    curves = [each.name for each in stage.metrics if each.curve]
    if sweep.kind == "halving" and metric not in curves:
        raise ConfigError(
            f"sweep=halving compares trials during training, and {sweep.metric} is known only at the end: use "
            f"sweep=tpe, or {' or '.join(f'{step}.{name}' for name in curves) or 'a metric of a training'}"
        )
    problems: list[str] = []
    for key, distribution in space.items():
        for value in _examples(distribution):
            try:
                compose_config([*fixed, f"{key}={value}"], config_dirs)
            except MlxchatError as error:
                problems += str(error).splitlines()
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return Search(
        base=base, plan=plan, fixed=fixed, config_dirs=config_dirs, space=space,
        direction="minimize" if direction == "minimize" else "maximize",
    )  # fmt: skip


def _varies(item: str) -> bool:
    try:
        return OverridesParser.create().parse_override(item).is_sweep_override()
    except HydraException:
        return False


def read_space(
    overrides: list[str], written: Mapping[str, str], config_dirs: Sequence[str] = ()
) -> tuple[list[str], Space]:
    """Return the fixed overrides of every trial, and the space.

    Args:
        overrides: overrides of the command line; varying ones belong to the space and take precedence over `written`.
        written: `sweep.space`: key → expression.
        config_dirs: folders with further YAML files, which globs search too.

    Raises:
        ConfigError: names every expression that cannot be searched.
    """
    fixed: list[str] = []
    space = Space()
    problems = []
    for key, expression in written.items():
        item = f"{key}={expression}"
        try:
            parsed = OverridesParser.create().parse_override(item)
            if not parsed.is_sweep_override():
                raise ConfigError(f"{item} does not vary. {_FORMS}")
            space[parsed.get_key_element()] = _distribution(parsed, config_dirs)
        except (HydraException, ConfigError) as error:
            problems.append(f"sweep.space: {str(error).splitlines()[0]}")
    for item in overrides:
        try:
            parsed = parse(item, list(config_dirs))
            if parsed.is_sweep_override():
                space[parsed.get_key_element()] = _distribution(parsed, config_dirs)
            else:
                space.pop(parsed.get_key_element(), None)
                fixed.append(item)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    if not space:
        raise ConfigError(f"a search needs settings that vary, as key=EXPRESSION. {_FORMS}")
    return fixed, space


def _distribution(item: Override, config_dirs: Sequence[str]) -> BaseDistribution:
    """Return the values of a varying override as an Optuna distribution."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value, text = item.value(), item.input_line
    step: float | None = None
    if isinstance(value, IntervalSweep):
        assert value.start is not None
        assert value.end is not None
        low, high = value.start, value.end
    elif isinstance(value, RangeSweep):
        numbers = list(value.range())
        if not numbers:
            raise ConfigError(f"{text}: the range is empty")
        low, high = min(numbers), max(numbers)
        step = None if "log" in value.tags else abs(value.step)
        if isinstance(step, float):  # floating-point sums may miss the end slightly
            high = float(Decimal(str(low)) + Decimal(str(step)) * (len(numbers) - 1))
    else:
        values = tuple(dict.fromkeys(listed(item, config_dirs)))
        if len(values) < 2:
            raise ConfigError(f"{text}: a choice needs several values")
        return CategoricalDistribution(values)
    if strange := value.tags - {"log"}:
        raise ConfigError(f'{text}: tag "{", ".join(sorted(strange))}" is unknown, expected log')
    if low >= high:
        raise ConfigError(f"{text}: the interval is empty; expected the smaller end first")
    is_whole, log = isinstance(low, int) and isinstance(high, int), "log" in value.tags
    if log and low < (1 if is_whole else 1e-300):
        raise ConfigError(f"{text}: a logarithmic interval begins at {'1 or more' if is_whole else 'more than 0'}")
    if is_whole:
        return IntDistribution(int(low), int(high), log=log, step=int(step or 1))
    return FloatDistribution(low, high, log=log, step=step)


def _examples(distribution: Any) -> Sequence[Any]:
    """Return values to test the composition with: every choice, or both ends."""
    return getattr(distribution, "choices", None) or (distribution.low, distribution.high)


def _definition(search: Search) -> dict[str, Any]:
    """Return what identifies a search: metric, space and all fixed settings."""
    from optuna.distributions import distribution_to_json

    sweep = search.base.config.sweep
    flat = {f"{step.name}: {key}": value for step in search.plan for key, value in flatten(step.identity).items()}
    fixed = {name: value for name, value in flat.items() if name.partition(": ")[2] not in search.space}
    halving = {"first_rung": sweep.first_rung, "factor": sweep.factor}
    return {
        "kind": sweep.kind, "metric": search.target, "direction": search.direction, "seed": sweep.seed,
        "random_trials": sweep.random_trials, **(halving if sweep.kind == "halving" else {}), "fixed": fixed,
        "space": {" " + key: distribution_to_json(found) for key, found in search.space.items()},
    }  # fmt: skip


class Trials:
    """The finished trials of a search: a study in Optuna's journal storage, used by one process."""

    def __init__(self, path: Path, direction: Direction = "minimize") -> None:
        """Open or create the journal.

        Raises:
            StoreError: it is damaged, or cannot be read.
        """
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.path = path
        unlocked: Any = _Unlocked()
        with self._faults():
            self._cut_torn_line()
            try:
                storage = JournalStorage(JournalFileBackend(str(path), lock_obj=unlocked))
                self.study = optuna.create_study(
                    storage=storage, study_name="mlxchat", direction=direction, load_if_exists=True
                )
            except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                raise StoreError(
                    f"{path} is damaged ({type(error).__name__}: {error}). Remove it, or give sweep.name=NAME"
                ) from None

    def begin(self, definition: dict[str, Any]) -> None:
        """Record the definition of the search, or check that it equals the recorded one.

        Raises:
            ConfigError: the journal belongs to another search; lists the differences.
        """
        known = self.study.user_attrs.get("definition")
        if known is None:
            with self._faults():
                self.study.set_user_attr("definition", definition)
            return
        changed = changes(flatten(known), flatten(json.loads(json.dumps(definition))))
        if changed:
            lines = [f"  {key}: {old} → {new}" for key, (old, new) in sorted(changed.items())]
            if len(lines) > _MOST_SHOWN:
                lines[_MOST_SHOWN:] = [f"  and {len(lines) - _MOST_SHOWN} more"]
            head = f"{self.path.parent} holds a search with other settings:"
            tail = "Choose another name (sweep.name=NAME), or remove that folder."
            raise ConfigError("\n".join([head, *lines, tail]))

    def add(self, space: Space, row: Row, value: float | None, asked: optuna.Trial | None = None) -> None:
        """Add a finished trial; value None: it failed. Intermediate values come from `asked`."""
        import optuna

        reported = asked.study.trials[asked.number] if asked is not None else None
        states = {"done": optuna.trial.TrialState.COMPLETE, "pruned": optuna.trial.TrialState.PRUNED}
        trial = optuna.trial.create_trial(
            state=states.get(row["status"], optuna.trial.TrialState.FAIL), value=value, params=row["overrides"],
            distributions=space, user_attrs={"row": redact(row)},
            intermediate_values=reported.intermediate_values if reported is not None else None,
            system_attrs=reported.system_attrs if reported is not None else None,
        )  # fmt: skip
        crash_point("search.ended")
        with self._faults():
            self.study.add_trial(trial)
        crash_point("search.told")

    def rows(self) -> list[Row]:
        """Return the rows of all finished trials."""
        return [trial.user_attrs["row"] for trial in self.study.get_trials(deepcopy=False)]

    def _cut_torn_line(self) -> None:
        """Remove an incomplete last line of a killed process, to which Optuna would append."""
        if self.path.exists():
            text = self.path.read_bytes()
            if not text.endswith(b"\n"):
                self.path.write_bytes(text[: text.rfind(b"\n") + 1])

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be used ({error.strerror}). Fix that and run the same command again."
            ) from error


class _Unlocked:
    """No lock: the folder is already locked, and Optuna's locks outlive a killed process by 30 s."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def ask(
    space: Space,
    told: Sequence[optuna.trial.FrozenTrial],
    *,
    number: int,
    seed: int,
    random_trials: int,
    direction: Direction,
    pruner: optuna.pruners.BasePruner | None = None,
) -> optuna.Trial:
    """Return a trial with the values to try; it is not added to a journal.

    Args:
        space: the search space.
        told: trials with results.
        number: number of the trial, from 1.
        seed: seed of the search.
        random_trials: number of results before they guide the choice.
        direction: of the metric.
        pruner: decides whether the trial stops early.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=(seed * 1_000_003 + number) % 2**32, n_startup_trials=random_trials)
    study = optuna.create_study(direction=direction, sampler=sampler, pruner=pruner or optuna.pruners.NopPruner())
    study.add_trials(told)
    return study.ask(space)


def _run_trials(search: Search, trials: Trials) -> None:
    """Run trials one after the other, each chosen by all earlier results."""
    import optuna

    sweep = search.base.config.sweep
    pruner = None
    if sweep.kind == "halving":
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=sweep.first_rung, reduction_factor=sweep.factor)
    for number in range(len(trials.rows()) + 1, sweep.trials + 1):
        trial = ask(
            search.space, trials.study.trials, number=number, seed=sweep.seed, random_trials=sweep.random_trials,
            direction=search.direction, pruner=pruner,
        )  # fmt: skip
        title = search.title(number, trial.params)
        print(f"\n── {title}", flush=True)
        row, value = _run_trial(search, number, trial)
        trials.add(search.space, row, value, trial)
        _remember(search, trials)
        said = f"failed: {row['error']}" if value is None else f"{search.target} {format_number(value)}"
        if row["status"] == "pruned":
            said += f", stopped after {row['iterations']} iterations"
        best = _best(search, trials)
        so_far = f" (best so far: trial {best['job']}, {format_number(best['value'])})" if best else ""
        print(f"── {title} {said}{so_far}", flush=True)
        if value is None and search.base.config.fail_fast:
            return


def _composed(search: Search, values: Mapping[str, Any]) -> tuple[Composed, list[PlannedStep], Store]:
    """Return a trial's configuration, limited to the steps that the metric needs, with its plan and store."""
    composed = compose_config(search.overrides(values), search.config_dirs)
    composed = replace(composed, config=replace(composed.config, targets=search.base.config.targets))
    store = Store(Path(composed.config.outputs))
    return composed, plan_to_run(composed.config, store), store


def _run_trial(search: Search, number: int, trial: optuna.Trial) -> tuple[Row, float | None]:
    """Run a trial to its end or until it is pruned; return its row and its metric, None if it failed.

    Raises:
        ConfigError: the step does not record this metric.
        Interrupted: a signal arrived.
    """
    row: Row = {"job": number, "overrides": dict(trial.params), "status": "failed", "metrics": {}}
    step, _, metric = search.target.rpartition(".")
    curve: dict[int, float] = {}
    prunes = search.base.config.sweep.kind == "halving"

    def is_worse(name: str, record: Record) -> bool:
        """Report a record of the metric; return True if the trial is to be pruned."""
        iteration, value = record.get("iteration"), record.get(metric)
        if not prunes or name != step or value is None or iteration is None or iteration in curve:
            return False
        curve[iteration] = value
        trial.report(value, iteration)
        return trial.should_prune()

    def look(name: str, record: Record) -> None:
        if is_worse(name, record):
            row["status"] = "pruned"
            signal.raise_signal(signal.SIGTERM)  # the training saves and stops as on Ctrl-C

    try:
        composed, plan, store = _composed(search, trial.params)
        row["steps"] = entries_of(plan)
        if any(is_worse(step, record) for record in _records(plan, store, step)):  # records of a killed attempt
            row["status"] = "pruned"
        elif not is_finished(plan):
            run_pipeline(composed, plan, job=f"trial{number}", on_record=look)
    except Interrupted:
        if row["status"] != "pruned":
            raise
    except MlxchatError as error:
        return row | {"error": str(error).splitlines()[0]}, None
    store.forget()
    row["steps"] = entries_of(plan)
    if prunes:
        row["curve"] = curve
    if row["status"] == "pruned":
        value = curve[max(curve)]
        return row | {"iterations": max(curve), "metrics": {search.target: value}, "value": value}, value
    final = _final(search, plan, store)
    if final is None:
        return row | {"error": f"the pipeline has no step {step}"}, None
    if not math.isfinite(final):
        return row | {"error": f"{search.target} is {final}"}, None
    return row | {"status": "done", "value": final, "metrics": metrics_of(plan, store, search.target)}, final


def _final(search: Search, plan: Sequence[PlannedStep], store: Store) -> float | None:
    """Return the metric of a finished trial; None: its step is not in the plan."""
    step, _, metric = search.target.rpartition(".")
    manifest = next((store.made(each.key) for each in plan if each.name == step), None)
    if manifest is None:
        return None
    recorded = recorded_numbers(manifest)
    if metric not in recorded:  # it may have been made with other evaluation hooks, which are not part of its key
        raise ConfigError(
            f"sweep.metric: the artifact of {step}, made before, has no {metric}. To make it again: force=[{step}]"
        )
    return float(recorded[metric])


def _records(plan: Sequence[PlannedStep], store: Store, step: str) -> list[Record]:
    """Return the records of a step so far, from its artifact or from an unfinished training."""
    key = next(each.key for each in plan if each.name == step)
    place = store.find_made(key)
    folder = place if place is not None else store.work(key) / "ckpt" / "records"
    return Records(folder / "metrics.jsonl").read()


def _remember(search: Search, trials: Trials) -> None:
    """Record each trial's artifacts, for `compare` and `report`."""
    jobs = {
        row["job"]: {
            "overrides": search.overrides(row["overrides"]), "settings": row["overrides"],
            "title": _shown(row["overrides"]), "steps": row.get("steps", []),
        }
        for row in sorted(trials.rows(), key=lambda row: row["job"])
    }  # fmt: skip
    SweepFolder(search.folder).write_state({"jobs": jobs})


def _conclude(search: Search, trials: Trials) -> int:
    """Write the table; print the best trial and its command."""
    rows = [{key: value for key, value in row.items() if key not in ("value", "curve")} for row in trials.rows()]
    folder, store = SweepFolder(search.folder), Store(Path(search.base.config.outputs))
    for row in rows:
        if row["status"] == "done":
            row |= product_of(row["steps"], store)
    rows = write_results(
        rows, search.folder, metric=search.target, less_is_better=search.direction == "minimize", unit="trial"
    )
    jobs = folder.state()["jobs"]
    folder.write_state({"sorted_by": search.target, "jobs": {str(row["job"]): jobs[str(row["job"])] for row in rows}})
    folder.tidy()
    print(f"side by side: mlxchat compare {search.folder.name}; mlxchat report {search.folder.name}")
    best = _best(search, trials)
    if best is None:
        print("no trial succeeded")
        return 1
    command = [item for item in search.overrides(best["overrides"]) if item.partition("=")[0].split(".")[0] != "sweep"]
    dirs = [argument for place in search.config_dirs for argument in ("--config-dir", place)]
    print(f"best: {search.title(best['job'], best['overrides'])}: {search.target} {best['value']:.6g}")
    print(redact(f"its command: mlxchat {shlex.join([*dirs, *command])}"), flush=True)
    if any(row["status"] == "pruned" for row in rows):
        print("to continue a pruned trial from its saved state, run its settings")
    name_best(rows, search.target, search.folder.name, store)
    return 0


def _best(search: Search, trials: Trials) -> Row | None:
    done = [row for row in trials.rows() if row["status"] == "done"]
    sign = 1 if search.direction == "minimize" else -1
    return min(done, key=lambda row: sign * row["value"], default=None)


def _shown(values: Mapping[str, Any]) -> str:
    pairs = values.items()
    return " ".join(f"{key}={format_number(value) if isinstance(value, float) else value}" for key, value in pairs)
