"""A pipeline from its settings to its artifacts: compose, plan, execute, notify trackers, report.

The verbs and a notebook use the same functions: `compose(...)` returns a `Pipeline` with `plan()` and `run()`.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from mlxchat.artifact import Artifact
from mlxchat.composition.compose import Composed, compose_config, split_options
from mlxchat.composition.sections import config_of, executor_of
from mlxchat.config.schema import Config, ExecutorConfig
from mlxchat.distributed.ranks import current_team
from mlxchat.errors import ConfigError, StepFailed, StoreError, redact, visible
from mlxchat.hub.cache import is_offline
from mlxchat.hub.client import endpoint, fetch_command
from mlxchat.ops.machine import device_kind, dtype_name
from mlxchat.planning.inputs import TextNeed, check_inputs, find_text_need
from mlxchat.planning.memory import check_memory
from mlxchat.runner.executors import check_installed
from mlxchat.runner.keys import find_unknown
from mlxchat.runner.leader import Execution, lead
from mlxchat.runner.plan import PlannedStep, entries_of, format_plan, make_plan
from mlxchat.runner.process import Environment, stop_on_signals
from mlxchat.runner.run import Run, complete
from mlxchat.store.files import Record, Records, crash_point, now, write_whole
from mlxchat.store.fingerprint import plain_of
from mlxchat.store.naming import LATEST, MODEL, called, links, runs
from mlxchat.store.store import Store
from mlxchat.trackers import Published, Results, Tracker, numbers_of


@dataclass(frozen=True)
class Pipeline:
    """A composed configuration, ready to be planned and run."""

    composed: Composed

    @property
    def config(self) -> Config:
        """The typed configuration."""
        return self.composed.config

    def plan(self) -> list[PlannedStep]:
        """Return the steps in topological order, each with its `state` (done, run, maybe or waiting) and `reason`."""
        return plan_of(self.config, Store(Path(self.config.outputs)))

    def run(self) -> dict[str, Artifact]:
        """Complete the pipeline as `mlxchat` does, and return step → artifact."""
        run_pipeline(self.composed)
        store = Store(Path(self.config.outputs))
        return {step.name: Artifact(place) for step in self.plan() if (place := store.find(step.rid)) is not None}


def compose(*overrides: str) -> Pipeline:
    """Return the pipeline of a command line: `compose("experiment=smoke", "seed=2")`.

    Raises:
        ConfigError: names everything that is wrong, with the nearest valid names.
    """
    return Pipeline(compose_config(*split_options(list(overrides))))


def run_pipeline(composed: Composed, plan: list[PlannedStep] | None = None, **options: Any) -> Path | None:
    """Complete the targets of a configuration; return the run's folder, or None if everything was done.

    `plan` is from `plan_to_run` (None: made here) and gets each step's result; `options` are those of PipelineRun.
    """
    store = Store(Path(composed.config.outputs))
    plan = plan_to_run(composed.config, store) if plan is None else plan
    work = PipelineRun(composed, plan, store, **options)
    _say("\n".join(filter(None, [format_plan(plan), str(work.need or "")])))
    if all(step.done for step in plan):
        with suppress(StoreError, PermissionError):  # a user who may only read the folder cannot name runs in it
            store.prepare()
            if work.becomes_latest:
                _name_again(composed, plan, store)
        which = "the step is" if len(plan) == 1 else f"all {len(plan)} steps are"
        print(f"nothing to do: {which} done. mlxchat report shows the results.")
        return None
    store.prepare()
    lead([work], store)
    if work.error is not None:
        raise work.error
    return work.run.folder


class PipelineRun(Execution):
    """A run with its folder, tracker and report."""

    def __init__(
        self,
        composed: Composed,
        plan: list[PlannedStep],
        store: Store,
        *,
        is_verb: bool = False,
        job: str | None = None,
        say: Callable[[str], None] = lambda line: _say(line),
        on_record: Callable[[str, Record], None] = lambda step, record: None,
    ) -> None:
        """Check that the plan can run.

        Args:
            composed: the configuration and its command line.
            plan: plan of its targets from `plan_to_run`. Updated with each step's result.
            store: store of its artifacts.
            is_verb: run by a verb such as import: no report, and it does not become the latest run.
            job: part of a sweep that it runs, such as job3, which is appended to its name; never the latest run.
            say: prints a line.
            on_record: called with a step's name and each record of its metrics.jsonl.
        """
        super().__init__(plan, store, self._start)
        self.composed, self.is_verb, self.job = composed, is_verb, job
        self.say, self.on_record = say, on_record
        self.executors = place_steps(composed.config, plan)
        self.becomes_latest = not is_verb and job is None
        self.need = find_text_need(composed.config, plan, store)

    def _start(self) -> Run:
        try:
            folder = _make_folder(self.composed, self.plan, self.store, job=self.job, is_verb=self.is_verb)
        except OSError as error:
            raise StoreError(f"{error.filename or self.store.outputs} cannot be written ({error.strerror})") from None
        # Stable over all attempts of a run: keys with names of inputs instead of contents.
        given = [{role: each["tree"] for role, each in step.artifacts.items()} for step in self.plan]
        ids = [step.key_with(step.inputs | trees) for step, trees in zip(self.plan, given, strict=True)]
        config = self.composed.config
        self.tracker = Tracker(
            config.tracker, folder, ids=ids, settings=redact(plain_of(config)), say=self.say,
            records=lambda step: self.store.work(self.planned[step].key) / "ckpt" / "records" / "metrics.jsonl",
        )  # fmt: skip

        def take(step: str, record: Record) -> None:
            self.tracker.log(step, record)
            self.on_record(step, record)

        return _run_of(self.composed, folder, self.need, say=self.say, on_metrics=take, team=current_team())

    def order(self, step: PlannedStep) -> Callable[[], None]:
        """Return the call that completes a step in a job."""
        words, dtype = [*self.composed.options, *self.composed.overrides], step.config.machine.compute_dtype
        folder = self.run.folder.name
        return partial(complete_elsewhere, words, folder, step.name, step.key, forced=step.forced, dtype=dtype)

    def end(self, error: BaseException | None) -> None:
        """Record how the run ended, write its report and finish its tracker."""
        super().end(error)
        try:
            if error is None and not self.is_verb:
                from mlxchat.report.document import show_report

                show_report(self.store.outputs, self.run.folder)
        except OSError as failure:  # all steps are done; the report can be written later
            text = f"the report could not be written ({failure.strerror}: {failure.filename})"
            self.say(f"{text}. Fix that and run: mlxchat report")
        finally:
            self.tracker.finish(_results(self.plan, self.store, self.run.folder, is_done=error is None))


def _run_of(composed: Composed, folder: Path, need: TextNeed | None, **options: Any) -> Run:
    config, device = composed.config, composed.config.machine.device
    return Run(
        folder=folder, seed=config.seed, data_seed=config.data_seed, overrides=composed.overrides,
        environment=Environment(_describe_device), fail_fast=config.fail_fast,
        hints={"train_chars": need.chars} if need is not None else {},
        uses_gpu=lambda: device == "gpu" or device_kind(device) != "cpu", **{"say": _say, **options},
    )  # fmt: skip


def complete_elsewhere(words: list[str], run: str, step: str, key: str, *, forced: bool, dtype: str) -> None:
    """Complete one step of a run that another process leads, inside a job; the step's inputs exist.

    `words` is the run's command line, `key` the step's key and `dtype` the compute_dtype that the run planned with.
    """
    composed = compose_config(*split_options(words))
    machine = replace(composed.config.machine, compute_dtype=dtype)
    config = replace(composed.config, machine=machine, force=[step] if forced else [])
    store = Store(Path(config.outputs))
    store.prepare()  # this machine must see the locks, too
    plan = plan_to_run(config, store)
    planned = {each.name: each for each in plan}
    if planned[step].key != key:
        raise StepFailed(f"{step} changed after it was submitted: its settings, data or inputs. Run the command again.")
    own = _run_of(composed, store.outputs / "runs" / run, find_text_need(config, plan, store))
    with stop_on_signals(own.request_stop, own.announce_stop):
        complete(planned[step], store, own, planned)


def plan_of(config: Config, store: Store) -> list[PlannedStep]:
    """Return the plan of a configuration, after checking its inputs."""
    dtype = dtype_name(config.machine.device, config.machine.compute_dtype)
    plan = make_plan(config, store, compute_dtype=dtype, config_of=config_of)
    check_inputs(config, plan)
    return plan


def plan_to_run(config: Config, store: Store) -> list[PlannedStep]:
    """Return the plan of a configuration to run, with all external data pinned: URLs without a checksum are fetched."""
    plan = plan_of(config, store)
    unknown = {place: what for step in plan if not step.done for place, what in find_unknown(step.externals).items()}
    if not unknown:
        return plan
    if branches := {place: what for place, what in unknown.items() if "://" not in what}:
        why = "HF_HUB_OFFLINE is set" if is_offline() else f"the Hub at {endpoint()} does not answer"
        lines = [f"{place}: the commit of {what} is unknown, since {why}" for place, what in branches.items()]
        raise ConfigError("\n".join([*lines, fetch_command()]))
    from mlxchat.hub.client import fetch_url

    for address in dict.fromkeys(unknown.values()):
        fetch_url(address)
    return plan_of(config, store)


def _name_again(composed: Composed, plan: list[PlannedStep], store: Store) -> None:
    """Record a run unless one has all these artifacts; a run with a model becomes the latest."""
    places = {step.name: place for step in plan if (place := store.find(step.rid)) is not None}
    known = [run for run in runs(store) if (store.outputs / "runs" / run).is_dir()]
    same = [run for run in known if places.items() <= links(store, run).items()]
    same.sort(key=lambda run: called(run) == composed.config.name)
    if not same:
        folder = _make_folder(composed, plan, store)
        same = [folder.name]
        for step, place in places.items():
            store.set_ref(folder.name, step, place)
        Records(folder / "events.jsonl").append({"time": now(), "event": "run_done"})
    if any(step.stage.produces == MODEL for step in plan):
        store.link_group(LATEST, same[-1])


def _make_folder(
    composed: Composed, plan: list[PlannedStep], store: Store, *, job: str | None = None, is_verb: bool = False
) -> Path:
    """Create a run's folder with a unique name, its plan.json and config.yaml."""
    config = composed.config
    name = f"{datetime.now():%Y%m%d-%H%M%S-%f}-{os.getpid()}-{redact(config.name)}{f'-{job}' if job else ''}"
    folder = store.outputs / "runs" / name
    folder.mkdir(parents=True)
    crash_point("run.folder")
    experiment = None if is_verb else composed.choices.get("experiment")  # verbs compose the default one without use
    record: dict[str, Any] = {
        "run": folder.name, "experiment": experiment, "choices": composed.choices, "overrides": composed.overrides,
        "started": now(), "targets": config.targets or list(config.pipeline), "command": composed.command,
        "cost_per_hour": config.report.cost_per_hour, "steps": entries_of(plan),
    }  # fmt: skip
    write_whole(folder / "plan.json", json.dumps(redact(record), indent=1).encode() + b"\n")
    import yaml

    (folder / "config.yaml").write_text(yaml.safe_dump(redact(plain_of(config)), sort_keys=False), "utf-8")
    return folder


def find_executors(config: Config, plan: list[PlannedStep]) -> dict[str, ExecutorConfig]:
    """Return step → executor of the unfinished steps that do not run on this machine."""
    executors = {step.name: executor_of(config, step.name) for step in plan if not step.done}
    return {name: executor for name, executor in executors.items() if executor.kind != "local"}


def place_steps(config: Config, plan: list[PlannedStep]) -> dict[str, ExecutorConfig]:
    """Return `find_executors` of a plan that can run. Steps elsewhere take this machine's dtype, part of their key."""
    executors, machine = find_executors(config, plan), config.machine
    check_memory(config, [step for step in plan if step.name not in executors])
    for step in plan:
        if (executor := executors.get(step.name)) is None:
            continue
        check_installed(executor)
        is_unknown = machine.compute_dtype == "auto" and device_kind(machine.device) == "cpu"
        if is_unknown and executor.gpus_per_node and step.stage.uses_gpu:
            where = f"{step.name} runs on GPUs of another machine (executor={executor.kind})"
            key = "whose dtype is part of its key: give machine.compute_dtype=bfloat16 or float32"
            raise ConfigError(f"{where}, {key}")
        dtype = dtype_name(machine.device, machine.compute_dtype)
        step.config = replace(step.config, machine=replace(machine, compute_dtype=dtype))
    return executors


def _results(plan: list[PlannedStep], store: Store, folder: Path, *, is_done: bool) -> Results:
    """Return the final results for a tracker."""
    page, found = folder / "report.html", Results(is_done=is_done)
    for step in plan:
        if (manifest := store.made(step.key)) is None:
            continue
        if numbers := numbers_of(manifest["metrics"]):
            found.numbers[step.name] = numbers
        place = store.outputs / "store" / manifest["name"]
        found.artifacts[step.name] = Published(id=manifest["rid"], kind=step.stage.produces, folder=place)
    return replace(found, report=page if page.is_file() else None)


def _describe_device() -> dict[str, Any]:
    from mlxchat.ops.device import describe_device

    return describe_device()


def _say(line: str) -> None:
    print(visible(redact(line)), flush=True, file=sys.stdout)
