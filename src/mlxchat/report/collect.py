"""Reads one run and the artifacts that it made or reused into a `RunReport`.

A report may be written while the run is still going, after it failed, or after artifacts were removed: what is absent
or damaged is None or empty, never an exception. Only a run folder without a readable plan is an error. Standard library
only, so that importing this module is fast.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from mlxchat.errors import DataError, StoreError
from mlxchat.evals.scores import Scores, mapping, number, read_scores
from mlxchat.store.files import Records, read_json
from mlxchat.store.manifest import Manifest
from mlxchat.store.store import Store

STAGE_LABELS = {"pretrain": "BASE", "midtrain": "MID", "sft": "SFT", "preference": "PREF", "rl": "RL"}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt and what the model made of it."""

    prompt: str
    text: str
    iteration: int | None = None


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step of the plan, with all that its artifact tells."""

    name: str
    stage: str
    kind: str
    artifact: str
    key: str
    """What the step was asked for."""
    rid: str
    """Of its artifact; "" while there is none."""
    inputs: dict[str, str]
    """Role to the name of the step that fills it."""
    outcome: str
    """run (computed by this run), cached, failed, unfinished (begun, no result) or missing."""
    reason: str = ""
    error: str = ""
    manifest: dict[str, Any] = field(default_factory=dict)
    """Empty while there is no artifact."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """The lines of metrics.jsonl, one per iteration and sort, in order of iteration."""
    samples: list[Sample] = field(default_factory=list)
    scores: Scores | None = None
    compression: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    num_parameters: int | None = None
    folder: Path | None = None
    """Where its files are; None while there is no artifact."""

    @property
    def seconds(self) -> float | None:
        """Wall clock of all attempts, whenever they happened."""
        return number(self.manifest.get("seconds"))

    def fact(self, name: str) -> float | None:
        """Return a number that the step derived from its settings or, failing that, measured."""
        derived, metrics = mapping(self.manifest.get("derived")), mapping(self.manifest.get("metrics"))
        value = number(derived.get(name))
        return number(metrics.get(name)) if value is None else value

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Return (iterations, values) of one metric, finite values only."""
        return self.all_series.get(name, ([], []))

    @cached_property
    def all_series(self) -> dict[str, tuple[list[float], list[float]]]:
        """Metric → (iterations, values): a long training has some hundred thousand numbers, looked at once."""
        found: dict[str, tuple[list[float], list[float]]] = {}
        for record in self.records:
            known = {name: value for name, each in record.items() if (value := number(each)) is not None}
            for name, value in known.items() if "iteration" in known else ():
                xs, ys = found.setdefault(name, ([], []))
                xs.append(known["iteration"])
                ys.append(value)
        return {text(name): points for name, points in found.items()}


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """One run: its plan, what became of each step, and how long it took."""

    name: str
    folder: Path
    steps: list[StepReport]
    """Inputs come before the steps that use them."""
    experiment: str | None = None
    started: str = ""
    outcome: str = ""
    """done, failed or unfinished; empty: of artifacts, not of one run."""
    error: str = ""
    seconds: float | None = None
    """From the first to the last event of this run."""
    cost_per_hour: float | None = None
    """In US dollars, if the configuration says what this machine costs."""
    command: str = ""

    def step(self, name: str) -> StepReport | None:
        """Return the step called `name`, or None if the plan has none."""
        return next((step for step in self.steps if step.name == name), None)

    @property
    def evals(self) -> list[StepReport]:
        """Steps that score a checkpoint, in the order in which those checkpoints are made."""
        order = {step.name: position for position, step in enumerate(self.steps)}
        evals = [step for step in self.steps if step.kind == "scores" or step.stage == "eval"]
        return sorted(evals, key=lambda step: order.get(checkpoint_name(step), len(order)))


def checkpoint_name(step: StepReport) -> str:
    """Return the name of the step whose checkpoint an eval step scored, or an empty string."""
    return step.inputs.get("checkpoint") or (step.scores.checkpoint if step.scores else "")


def latest_run(outputs: Path) -> Path:
    """Return the newest run folder that has a plan; StoreError if there is none."""
    # Names begin with the time of the start, so the order of names is the order of runs.
    planned = sorted(path.parent for path in (outputs / "runs").glob("*/plan.json"))
    if not planned:
        raise StoreError(Store(outputs).lacking("runs"))
    return planned[-1]


def collect(outputs: Path, run: Path) -> RunReport:
    """Return a run and every artifact of its plan, inputs first; StoreError if it has no readable plan.json."""
    plan = mapping(read_json(run / "plan.json"))
    entries = [mapping(entry) for entry in sequence(plan.get("steps"))]
    entries = [entry for entry in entries if text(entry.get("step"))]
    if not entries:
        wrong = f"{run / 'plan.json'} is absent, unreadable or without steps"
        raise StoreError(f"{wrong}; expected the plan of a run; name a folder of outputs/runs")
    events = Records(run / "events.jsonl").read()
    ends = [event for event in events if event.get("event") in ("run_done", "run_failed")]
    outcome = text(ends[-1]["event"]).removeprefix("run_") if ends else "unfinished"
    store = Store(outputs)
    times = [datetime.fromisoformat(text(event["time"])).timestamp() for event in events if "time" in event]
    return RunReport(
        name=text(plan.get("run")) or run.name, experiment=text(plan.get("experiment")) or None, folder=run,
        started=text(plan.get("started")), command=text(plan.get("command")), outcome=outcome,
        error=text(ends[-1].get("error")) if outcome == "failed" else "",
        seconds=max(times) - min(times) if len(times) > 1 else None, cost_per_hour=number(plan.get("cost_per_hour")),
        steps=[_read_step(store, entry, events) for entry in entries],
    )  # fmt: skip


def collect_steps(outputs: Path, name: str, entries: list[dict[str, Any]], folder: Path) -> RunReport:
    """Return what there is of a plan's steps, whichever runs made them: a job of a sweep, for instance.

    `entries` are as in plan.json: step, stage, kind, artifact, rid, inputs. The report belongs in `folder`.
    """
    store = Store(outputs)
    return RunReport(name=name, folder=folder, steps=[_read_step(store, mapping(entry), []) for entry in entries])


def entries_of_artifacts(outputs: Path, places: list[Path]) -> list[dict[str, Any]]:
    """Return an entry for each artifact and, before it, for all that it was made from.

    A step keeps its name; a second artifact of a step of that name gets the start of its id behind it.
    """
    store = Store(outputs)
    names: dict[str, str] = {}
    entries: list[dict[str, Any]] = []

    def visit(place: Path) -> str:
        manifest = mapping(read_json(place / "manifest.json"))
        rid, step = text(manifest.get("rid")) or place.name, text(manifest.get("step")) or place.name
        if rid in names:
            return names[rid]
        name = names[rid] = step if step not in names.values() else f"{step}-{rid[:6]}"
        sources: dict[str, str] = {}
        for role, source in mapping(manifest.get("inputs")).items():
            made = mapping(source)
            found = _find_artifact(store, text(made.get("rid")), [text(made.get("artifact"))])
            sources[role] = visit(found) if found else text(made.get("step"))
        entries.append({"step": name, "stage": text(manifest.get("stage")), "kind": text(manifest.get("kind")),
                        "artifact": place.name, "rid": rid, "inputs": sources})  # fmt: skip
        return name

    for place in places:
        visit(place)
    return entries


def _read_step(store: Store, entry: dict[str, Any], events: list[dict[str, Any]]) -> StepReport:
    name, artifact, key, rid = (text(entry.get(part)) for part in ("step", "artifact", "key", "rid"))
    own = [e for e in events if e.get("step") == name and text(e.get("event")).startswith("step_")]
    named = [text(event.get("artifact")) for event in reversed(own)]
    made: Manifest = {}
    with suppress(StoreError):  # a run that was killed did not note the id
        made = store.made(key, rid) or {}
    folder = _find_artifact(store, text(made.get("rid")) or rid, [*named, artifact])
    manifest = made or (mapping(read_json(folder / "manifest.json")) if folder else {})
    if folder and manifest:
        artifact, records = folder.name, folder
    else:  # what a step has recorded so far is worth showing while it runs
        folder, records = store.work(key) / "out", store.work(key) / "ckpt" / "records"
    outcome, error = _step_outcome([text(event.get("event")) for event in own], bool(manifest)), ""
    if outcome == "failed":
        error = next((message for event in reversed(own) if (message := text(event.get("error")))), "")
    scores = mapping(read_json(folder / "scores.json"))
    if scores:
        scores.setdefault("checkpoint", mapping(entry.get("inputs")).get("checkpoint"))
    samples = Records(records / "samples.jsonl").read()
    return StepReport(
        name=name, stage=text(entry.get("stage")), kind=text(entry.get("kind")), artifact=artifact, key=key,
        rid=text(manifest.get("rid")) or rid, reason=text(entry.get("reason")), outcome=outcome, error=error,
        inputs={text(role): text(step) for role, step in mapping(entry.get("inputs")).items()},
        records=_by_iteration(Records(records / "metrics.jsonl").read()),
        samples=_last_samples([*samples, *map(mapping, sequence(scores.get("samples")))]),
        scores=read_scores(scores) if scores else None, compression=mapping(read_json(folder / "compression.json")),
        model=mapping(read_json(folder / "config.json")), num_parameters=num_parameters(folder),
        manifest=manifest, folder=folder if manifest else None,
    )  # fmt: skip


def _find_artifact(store: Store, rid: str, names: Iterable[str]) -> Path | None:
    """Return the folder of the complete artifact: of one of `names`, or else of this id."""
    folders = (store.outputs / "store" / name for name in names if name and Path(name).name == name)
    # A run that found the artifact of another one keeps that one's name, which may have another label.
    return next((folder for folder in folders if (folder / "manifest.json").is_file()), store.find(rid))


def _step_outcome(events: list[str], is_published: bool) -> str:
    ends = [event for event in events if event != "step_started"]
    last = ends[-1] if ends else ""
    if is_published:
        is_others = last in ("step_cached", "step_failed", "step_interrupted")  # another run made the artifact
        return "run" if events and not is_others else "cached"
    if last == "step_failed":
        return "failed"
    return "unfinished" if events and events[-1] in ("step_started", "step_interrupted") else "missing"


def _by_iteration(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    # A resumed step writes some iterations again; the later record is the one that counts.
    latest: dict[tuple[float, tuple[str, ...]], dict[str, Any]] = {}
    for record in records:
        if (iteration := number(record.get("iteration"))) is not None:
            latest[iteration, tuple(sorted(record))] = record
    return [latest[key] for key in sorted(latest, key=lambda key: key[0])]


def _last_samples(records: list[dict[str, Any]]) -> list[Sample]:
    """Return the samples of the last iteration that has any."""
    found = []
    for record in records:
        if "text" in record:
            at = number(record.get("iteration"))
            iteration = None if at is None else int(at)
            found.append(Sample(prompt=text(record.get("prompt")), text=text(record["text"]), iteration=iteration))
    last = max((sample.iteration or 0 for sample in found), default=0)
    return [sample for sample in found if (sample.iteration or 0) == last]


def sequence(value: object) -> list[Any]:
    """Return `value` if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def text(value: object) -> str:
    """Return a string unchanged, None as an empty string, anything else as JSON."""
    if value is None:
        return ""
    found = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return found.encode(errors="backslashreplace").decode()  # unpaired surrogates have no UTF-8


def num_parameters(folder: Path) -> int | None:
    """Return a checkpoint's number of parameters (its base model's for adapters); None if it cannot be read."""
    from mlxchat.model.sizes import count_parameters
    from mlxchat.planning.inputs import sizes_of_folder

    try:
        return count_parameters(sizes_of_folder(folder))["total"]
    except (OSError, ValueError, DataError):
        return None
