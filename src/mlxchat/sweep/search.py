"""`mlxchat sweep=tpe` and `sweep=halving`: trials chosen by Optuna from earlier results, in its journal.

A choice depends only on the results so far, the seed and the trial's number, and a trial is added to the journal when
it has ended. So a search that was killed at any moment continues with the same trials. With other settings another one
begins, in the same journal.
"""

from __future__ import annotations

import math
import shlex
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from mlxchat.composition.compose import Composed, compose_config, split_config_dirs
from mlxchat.config.schema import SweepConfig
from mlxchat.config.wording import format_number
from mlxchat.errors import ConfigError, Interrupted, MlxchatError, redact
from mlxchat.pipeline import plan_of, plan_to_run, run_pipeline
from mlxchat.runner.plan import PlannedStep, entries_of
from mlxchat.store import locks
from mlxchat.store.files import Record, Records, crash_point
from mlxchat.store.fingerprint import canonical_json, encode_digest, flatten
from mlxchat.store.store import Store
from mlxchat.sweep.sweeper import Row, conclude, find_metric, listed, metrics_of, parse, write_state

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

Space = dict[str, "BaseDistribution"]
_FORMS = "Expected choice(a,b), range(1,9), interval(0.1,1), int(interval(1,8)) or tag(log,interval(0.1,1)), in quotes"


@dataclass(kw_only=True)
class Search:
    """A search: the configuration of its first point, its space and its metric."""

    base: Composed
    fixed: list[str]  # overrides of every trial
    config_dirs: list[str]
    space: Space
    plan: list[PlannedStep]  # of the first point
    direction: str  # minimize or maximize

    def __post_init__(self) -> None:
        config = self.base.config
        self.sweep, self.target = config.sweep, str(config.sweep.metric)
        self.store = Store(Path(config.outputs))
        # Not <name>, so that the run's name refers to runs only.
        self.folder = self.store.outputs / "multirun" / (config.sweep.name or f"{config.name}-search")

    def overrides(self, values: Mapping[str, Any]) -> list[str]:
        """Return the command line of a trial."""
        return [*self.fixed, *(f"{key}={value}" for key, value in values.items())]


def run_search(arguments: list[str]) -> int:
    """Run the remaining trials of a command line with `sweep=tpe` or `halving`; return 1 if none succeeded, else 0."""
    overrides, config_dirs = split_config_dirs([item for item in arguments if item not in ("-m", "--multirun")])
    search = read_search(overrides, config_dirs)
    search.store.prepare()

    def tell_waiting(owner: dict[str, Any]) -> None:
        print(f"{locks.name_process(owner)} runs this search ({search.folder}); waiting", flush=True)

    with locks.hold(search.folder / "search.lock", {"search": search.folder.name}, tell_waiting):
        study = open_study(search.folder / "journal.log", search.direction, name_of_study(search))
        _run_trials(search, study)
        return _conclude(search, rows_of(study))


def read_search(overrides: list[str], config_dirs: list[str]) -> Search:
    """Return the search, after composing every choice and both ends of every interval; nothing is written."""
    if find_spec("optuna") is None:
        raise ConfigError("a search needs Optuna: pip install 'mlxchat[search]' (or optuna)")
    fixed, space = read_space(overrides, config_dirs)
    first = {key: _examples_of(distribution)[0] for key, distribution in space.items()}
    problems: list[str] = []
    composed: list[Composed] = []
    for key, distribution in space.items():
        for value in _examples_of(distribution):
            point = [f"{name}={chosen}" for name, chosen in (first | {key: value}).items()]
            try:
                composed.append(compose_config([*fixed, *point], config_dirs))
            except MlxchatError as error:
                problems += str(error).splitlines()
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    base = composed[0]
    sweep = base.config.sweep
    step, _, metric = str(sweep.metric).rpartition(".")
    if base.config.targets is None and step in base.config.pipeline:  # steps after the metric's are not needed
        base = replace(base, config=replace(base.config, targets=[step]))
    plan = plan_of(base.config, Store(Path(base.config.outputs)))
    direction = find_metric(str(sweep.metric), sweep.direction, [plan])
    declared = next((planned.stage.metric(metric) for planned in plan if planned.name == step), None)
    if sweep.kind == "halving" and (declared is None or not declared.curve):
        late = f"sweep=halving compares trials during training, and {sweep.metric} is known only at the end"
        raise ConfigError(f"{late}: use sweep=tpe, or a metric such as pretrain.val_bpb")
    return Search(base=base, fixed=fixed, config_dirs=config_dirs, space=space, plan=plan, direction=direction)


def read_space(overrides: list[str], config_dirs: list[str]) -> tuple[list[str], Space]:
    """Return the fixed overrides of every trial, and the space: `sweep.space` and what varies on the command line."""
    given = {item.partition("=")[0]: parse(item, config_dirs) for item in overrides}
    fixed = [str(item.input_line) for item in given.values() if not item.is_sweep_override()]
    written = compose_config(fixed, config_dirs).config.sweep.space
    of_yaml = {key: parse(f"{key}={text}", config_dirs) for key, text in written.items() if key not in given}
    varying = of_yaml | {key: item for key, item in given.items() if item.is_sweep_override()}
    space: Space = {}
    problems = []
    for key, item in varying.items():
        try:
            space[key] = _distribution(item)
        except (ConfigError, ValueError) as error:  # ValueError: from Optuna
            problems.append(f"{item.input_line}: {error}")
    if problems or not space:
        problems = problems or ["a search needs settings that vary, as key=EXPRESSION"]
        raise ConfigError("\n".join([*problems, _FORMS]))
    return fixed, space


def _distribution(item: Override) -> BaseDistribution:
    """Return the values of a varying override as an Optuna distribution; ValueError if it cannot be searched."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = item.value()
    if not item.is_sweep_override():
        raise ValueError("it does not vary")
    if not isinstance(value, IntervalSweep | RangeSweep):
        return CategoricalDistribution(tuple(dict.fromkeys(listed(item))))
    if value.tags - {"log"}:
        raise ValueError(f'tag "{", ".join(sorted(value.tags))}" is unknown, expected log')
    log = "log" in value.tags
    low: Any = value.start
    high: Any = value.end if isinstance(value, IntervalSweep) else None
    step: Any = None
    if isinstance(value, RangeSweep):
        numbers = sorted(value.range())
        if not numbers:
            raise ValueError("the range is empty")
        low, high = numbers[0], round(numbers[-1], 12)  # sums of floating-point steps may miss the end slightly
        step = None if log else abs(value.step)
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log, step=step or 1)
    return FloatDistribution(low, high, log=log, step=step)


def _examples_of(distribution: Any) -> Sequence[Any]:
    """Return values to test the composition with: every choice, or both ends."""
    return getattr(distribution, "choices", None) or (distribution.low, distribution.high)


def name_of_study(search: Search) -> str:
    """Return the name of a search's study in the journal: the hash of its metric, space and all fixed settings."""
    from optuna.distributions import distribution_to_json

    sweep, space = search.sweep, search.space
    flat = {f"{step.name}: {key}": value for step in search.plan for key, value in flatten(step.identity).items()}
    settings: dict[str, Any] = {key: value for key, value in flat.items() if key.partition(": ")[2] not in space}
    settings |= {f"space of {key}": distribution_to_json(found) for key, found in space.items()}
    chosen = [sweep.kind, search.target, search.direction, sweep.random_trials, sweep.seed]
    return encode_digest(canonical_json([settings, chosen]))


def open_study(path: Path, direction: str, name: str) -> optuna.Study:
    """Return the finished trials of a search: a study in Optuna's journal, which is created if needed."""
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    text = path.read_bytes() if path.exists() else b""
    if not text.endswith(b"\n"):  # Optuna would append to the incomplete line of a killed process
        path.write_bytes(text[: text.rfind(b"\n") + 1])
    # The folder is already locked, and Optuna's locks outlive a killed process by 30 s.
    unlocked: Any = SimpleNamespace(acquire=lambda: True, release=lambda: None)
    storage = JournalStorage(JournalFileBackend(str(path), lock_obj=unlocked))
    goal = optuna.study.StudyDirection[direction.upper()]
    return optuna.create_study(storage=storage, study_name=name, direction=goal, load_if_exists=True)


def rows_of(study: optuna.Study) -> list[Row]:
    """Return the rows of all finished trials."""
    return [trial.user_attrs["row"] for trial in study.get_trials(deepcopy=False)]


def ask(study: optuna.Study, space: Space, sweep: SweepConfig) -> optuna.Trial:
    """Return the next trial with the values to try; the journal does not have it until `tell`."""
    import optuna

    number = len(study.get_trials(deepcopy=False)) + 1
    seed = (sweep.seed * 1_000_003 + number) % 2**32
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=sweep.random_trials)
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if sweep.kind == "halving":
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    copy = optuna.create_study(direction=study.direction, sampler=sampler, pruner=pruner)
    copy.add_trials(study.trials)
    return copy.ask(space)


def tell(study: optuna.Study, asked: optuna.Trial, row: Row) -> None:
    """Add a finished trial to the journal; without a value it failed."""
    from optuna.trial import TrialState, create_trial

    trial = asked.study.trials[asked.number]
    crash_point("search.ended")
    ended = create_trial(
        state={"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED}.get(row["status"], TrialState.FAIL),
        value=row.get("value"), params=trial.params, distributions=trial.distributions, system_attrs=trial.system_attrs,
        user_attrs={"row": redact(row)}, intermediate_values=trial.intermediate_values,
    )  # fmt: skip
    study.add_trial(ended)
    crash_point("search.told")


def _run_trials(search: Search, study: optuna.Study) -> None:
    """Run trials one after the other, each chosen by all earlier results."""
    goal = f"the {'smallest' if search.direction == 'minimize' else 'largest'} {search.target}"
    print(f"{search.sweep.trials} trials for {goal}; their results: {search.folder}", flush=True)
    write_state(search.folder, rows_of(study))
    for number in range(len(rows_of(study)) + 1, search.sweep.trials + 1):
        trial = ask(study, search.space, search.sweep)
        title = redact(f"trial {number}/{search.sweep.trials} {_shown(trial.params)}")
        print(f"\n── {title}", flush=True)
        row = _run_trial(search, number, trial)
        tell(study, trial, row)
        write_state(search.folder, rows_of(study))
        said = f"{search.target} {format_number(row['value'])}" if "value" in row else f"failed: {row['error']}"
        if row["status"] == "pruned":
            said += f", stopped after {row['iterations']} iterations"
        best = _best(search, rows_of(study))
        so_far = f" (best so far: trial {best['job']}, {format_number(best['value'])})" if best else ""
        print(redact(f"── {title} {said}{so_far}"), flush=True)


def _run_trial(search: Search, number: int, trial: optuna.Trial) -> Row:
    """Run a trial to its end or until it is pruned; return its row, without `value` if it failed."""
    row: Row = {"job": number, "settings": dict(trial.params), "status": "failed", "metrics": {}, "steps": []}
    row["title"] = _shown(trial.params)
    step, _, metric = search.target.rpartition(".")
    seen: set[int] = set()
    store = search.store

    def is_worse(name: str, record: Record) -> bool:
        """Report a record of the metric; return True if the trial is to be pruned."""
        iteration, value = record.get("iteration", -1), record.get(metric)
        if search.sweep.kind != "halving" or name != step or value is None or iteration in (-1, *seen):
            return False
        seen.add(iteration)
        trial.report(value, iteration)
        if trial.should_prune():
            row.update(status="pruned", iterations=iteration, value=value, metrics={search.target: value})
        return bool(row["status"] == "pruned")

    def look(name: str, record: Record) -> None:
        if is_worse(name, record):
            signal.raise_signal(signal.SIGTERM)  # the training saves and stops as on Ctrl-C

    try:
        composed = compose_config(search.overrides(trial.params), search.config_dirs)
        composed = replace(composed, config=replace(composed.config, targets=search.base.config.targets))
        plan = plan_to_run(composed.config, store)
        row["steps"] = entries_of(plan)
        key = next(each.key for each in plan if each.name == step)
        # Of an earlier run of the same settings, or of a killed attempt.
        so_far = (store.find_made(key) or store.work(key) / "ckpt" / "records") / "metrics.jsonl"
        is_pruned = any(is_worse(step, record) for record in Records(so_far).read())
        if not is_pruned and not all(planned.done for planned in plan):
            run_pipeline(composed, plan, job=f"trial{number}", on_record=look)
    except Interrupted:
        if row["status"] != "pruned":
            raise
    except MlxchatError as error:
        return row | {"error": str(error).splitlines()[0]}
    store.forget()
    row["steps"] = entries_of(plan)
    if row["status"] == "pruned":
        return row
    found = metrics_of(plan, store, search.target)
    value = found.get(search.target, math.nan)
    if not math.isfinite(value):
        return row | {"error": f"{search.target} is {value}; if {step} was made without it: force=[{step}]"}
    return row | {"status": "done", "value": value, "metrics": found}


def _conclude(search: Search, rows: list[Row]) -> int:
    """Write the table and the report; print the best trial and its command."""
    if not any("value" in row for row in rows):
        print("no trial succeeded")
    less_is_better = search.direction == "minimize"
    conclude(search.folder, search.store, rows, metric=search.target, less_is_better=less_is_better, unit="trial")
    best = _best(search, rows)
    if best is None:
        return 1
    command = [item for item in search.overrides(best["settings"]) if item.partition("=")[0].split(".")[0] != "sweep"]
    dirs = [argument for place in search.config_dirs for argument in ("--config-dir", place)]
    print(redact(f"best trial: {best['job']} {best['title']}: {search.target} {best['value']:.6g}"))
    print(redact(f"its command: mlxchat {shlex.join([*dirs, *command])}"), flush=True)
    return 0


def _best(search: Search, rows: Sequence[Row]) -> Row | None:
    sign = 1 if search.direction == "minimize" else -1
    return min((row for row in rows if row["status"] == "done"), key=lambda row: sign * row["value"], default=None)


def _shown(values: Mapping[str, Any]) -> str:
    pairs = values.items()
    return " ".join(f"{key}={format_number(value) if isinstance(value, float) else value}" for key, value in pairs)
