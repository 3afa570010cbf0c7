"""Run a plan: one step after the other, each under its lock, each published whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxchat.errors import Interrupted, MlxchatError, StepFailed, StoreError
from mlxchat.runner import attempts as attempt_log
from mlxchat.runner import locks
from mlxchat.runner.aliases import action_key, publish_alias, remember_action
from mlxchat.runner.context import Context, Sections
from mlxchat.runner.environment import Environment, peak_memory_bytes, reset_peak_memory
from mlxchat.runner.fingerprint import plain_of
from mlxchat.runner.plan import PlannedStep, Verdict, judge
from mlxchat.runner.progress import format_bytes, format_count, format_number, format_seconds
from mlxchat.runner.records import Record, Records, now
from mlxchat.runner.shared import SharedArtifacts
from mlxchat.runner.store import Manifest, Store, describe_outputs


def _ignore_metrics(step: str, record: Record) -> None:
    """Drop a record: nobody tracks this run."""


@dataclass(kw_only=True)
class Run:
    """One invocation: where it reports, and what it knows about itself."""

    folder: Path
    """outputs/runs/<…>."""
    config: Any
    """The typed configuration."""
    seed: int
    force: list[str]
    overrides: list[str]
    environment: Environment
    say: Callable[[str], None] = print
    """Where lines for people go."""
    on_metrics: Callable[[str, Record], None] = _ignore_metrics
    """Called with step and record, for trackers."""
    stop_signal: int | None = field(default=None, init=False)

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return self.folder.name

    def event(self, event: str, **details: Any) -> None:
        """Add a line to events.jsonl."""
        Records(self.folder / "events.jsonl").append({"time": now(), "event": event, **details})


def execute(plan: list[PlannedStep], store: Store, run: Run) -> None:
    """Run what the plan says is not done, and point the refs of this run and `latest` at every step's artifact.

    Raises:
        Interrupted: a signal arrived; everything finished so far is kept, the current step can continue.
        StepFailed: a step raised or did not make its outputs.
    """
    planned = {step.name: step for step in plan}
    for step in plan:
        _ = step.code  # looked at now: an edit while the first steps run is not what later ones are made with
    run.event("run_started", steps=[step.name for step in plan])
    with _signals(run):
        for step in plan:
            try:
                place = _complete(step, store, run, planned)
            except MlxchatError as error:
                run.event("run_failed", step=step.name, error=str(error))
                raise
            store.set_ref(run.name, step.name, place)
            store.set_ref("latest", step.name, place)
            # A stage need not look at signals: then the run stops between its steps.
            if run.stop_signal is not None and step is not plan[-1]:
                message = f"stopped after {step.name}. The same command continues from there."
                run.event("run_failed", error=message)
                raise Interrupted(message, run.stop_signal)
    run.event("run_done")


def _complete(step: PlannedStep, store: Store, run: Run, planned: dict[str, PlannedStep]) -> Path:
    """Return the folder with the step's files, made now if need be."""
    store.forget()
    step.verdict = judge(step, store, forced=step.forced, planned=planned)
    place = store.find(step.rid) if step.done else None
    if place is not None:
        run.event("step_cached", step=step.name, artifact=place.name)
        return place
    began = now()

    def tell_waiting(owner: dict[str, Any]) -> None:
        who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')} (run {owner.get('run', '?')})"
        run.say(f"{step.name:<10} waits: {who} is making it")

    with locks.hold(store.lock(step.rid), {"run": run.name, "step": step.name}, tell_waiting) as waited:
        store.forget()
        if waited:
            error = attempt_log.failure_since(store.work(step.rid), began)
            if error is not None:
                raise StepFailed(f"step {step.name} failed in the process that was waited for: {error}")
        # Another process may have finished it before we got the lock.
        step.verdict = judge(step, store, forced=step.forced and not waited, planned=planned)
        place = store.find(step.rid) if step.done else None
        if place is not None:
            run.event("step_cached", step=step.name, artifact=place.name)
        elif step.verdict.original is not None:
            place = _share(step, step.verdict.original, store, run, planned)
        else:
            place = _make(step, store, run, planned)
        step.verdict = Verdict(state="done")  # for the steps below
        return place


def _share(step: PlannedStep, original: Manifest, store: Store, run: Run, planned: dict[str, PlannedStep]) -> Path:
    """Publish an alias of an artifact that was made from inputs of the same contents. The caller holds the lock."""
    _, lineage = _find_inputs(step, store, planned)
    facts = {"run": run.name, "overrides": run.overrides, "argv": run.environment.record()["argv"]}
    place = publish_alias(store, step, original, lineage, facts)
    run.event("step_shared", step=step.name, artifact=step.artifact, original=place.name)
    run.say(f"{step.name:<10} done: its inputs have the contents that {place.name} was made from")
    return place


def _find_inputs(
    step: PlannedStep, store: Store, planned: dict[str, PlannedStep]
) -> tuple[dict[str, Path], dict[str, Manifest]]:
    """Return role → folder, and role → what the manifest records of it."""
    inputs: dict[str, Manifest] = {}
    folders: dict[str, Path] = {}
    for role, source in step.inputs.items():
        folder, manifest = store.find(planned[source].rid), store.read(planned[source].rid)
        assert folder is not None, f"{source} ran before {step.name}"
        assert manifest is not None
        folders[role], inputs[role] = folder, manifest
    for role, manifest in step.artifacts.items():
        folder = store.find(manifest["rid"])
        if folder is None:
            raise StoreError(f"{manifest['name']}, which {step.name} needs as {role}, is no longer in {store.outputs}")
        folders[role], inputs[role] = folder, manifest
    lineage = {
        role: {key: manifest[source] for key, source in _INPUT_KEYS.items()} for role, manifest in inputs.items()
    }
    return folders, lineage


def _make(step: PlannedStep, store: Store, run: Run, planned: dict[str, PlannedStep]) -> Path:
    """Run the stage in the step's work folder and publish what it made. The caller holds the lock."""
    work = store.work(step.rid)
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    folders, lineage = _find_inputs(step, store, planned)
    trees = {role: manifest["tree"] for role, manifest in lineage.items()}
    _drop_work_on_other_inputs(work, trees)
    ctx = Context(
        step=step.name, stage=step.stage.name, inputs=folders, input_steps=dict(step.inputs), out=out,
        config=Sections(run.config, step.stage.config, step.stage.name),  # type: ignore[arg-type]
        work=work / "ckpt", root_seed=run.seed, stop_signal=lambda: run.stop_signal, on_metrics=run.on_metrics,
        shared=SharedArtifacts(
            outputs=store.outputs, run=run.name, inputs=lineage, facts=run.environment.record, say=run.say
        ),
    )  # fmt: skip
    attempt = attempt_log.start(work, run.name, step.name)
    run.event("step_started", step=step.name, artifact=step.artifact, reason=step.reason)
    run.say(f"{step.name:<10} starts ({step.reason})")
    reset_peak_memory()
    began = time.monotonic()
    try:
        step.stage.load()(ctx)
        missing = [name for name in step.stage.outputs if not (out / name).exists()]
        if missing:
            raise StepFailed(f"step {step.name} did not make {', '.join(missing)} ({out})")
    except Interrupted as stop:
        attempt_log.finish(work, attempt, "interrupted", str(stop), ctx.resumed_from)
        run.event("step_interrupted", step=step.name, error=str(stop))
        raise
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        attempt_log.finish(work, attempt, "failed", text, ctx.resumed_from)
        run.event("step_failed", step=step.name, error=text)
        if isinstance(error, MlxchatError) or not isinstance(error, Exception):
            raise
        log = run.folder / f"{step.name}-error.log"
        log.write_text(traceback.format_exc(), encoding="utf-8")
        raise StepFailed(f"step {step.name} failed: {text}\nTraceback: {log}") from error
    try:
        for path in (ctx.work / "records").glob("*.jsonl"):
            shutil.copyfile(path, out / path.name)
        attempt_log.finish(work, attempt, "done", None, ctx.resumed_from)
        manifest = _describe(step, ctx, run, lineage, attempt_log.read(work))
        place = store.publish(out, step.artifact, manifest)
        remember_action(store, manifest["akey"], step.rid)
    except OSError as error:
        text = f"{step.name} was made but could not be published: {error.strerror or error} ({error.filename or out})"
        with suppress(OSError):  # a full disk takes no notes either
            attempt_log.finish(work, attempt, "failed", text, ctx.resumed_from)
        raise StoreError(f"{text}. Mend that and run the same command again.") from error
    shutil.rmtree(work, ignore_errors=True)
    seconds = time.monotonic() - began
    run.event("step_done", step=step.name, artifact=place.name, seconds=seconds)
    run.say(f"{step.name:<10} done in {format_seconds(seconds)}: {_summary(manifest)}")
    return place


def _drop_work_on_other_inputs(work: Path, trees: dict[str, str]) -> None:
    """Throw resumable state away if an input was rebuilt with other bytes since it was saved."""
    note, text = work / "inputs.json", json.dumps(trees, sort_keys=True)
    if note.exists() and note.read_text(encoding="utf-8") != text:
        shutil.rmtree(work / "ckpt", ignore_errors=True)
    note.write_text(text, encoding="utf-8")


def _describe(
    step: PlannedStep, ctx: Context, run: Run, lineage: dict[str, Manifest], attempts: list[Record]
) -> Manifest:
    """Return everything that the manifest says."""
    outputs, tree = describe_outputs(ctx.out)
    metrics = dict(ctx.metrics)
    sections = {section: plain_of(getattr(run.config, section)) for section in step.stage.config}
    return {
        "schema": 1,
        "rid": step.rid,
        "akey": action_key(step, {role: made["tree"] for role, made in lineage.items()}),
        "alias_of": None,
        "name": step.artifact,
        "stage": step.stage.name,
        "step": step.name,
        "kind": step.stage.produces,
        "version": step.stage.version,
        "config": step.identity,
        "excluded": {"machine": plain_of(run.config.machine)},
        "full_config": sections,
        "overrides": run.overrides,
        "inputs": lineage,
        "outputs": outputs,
        "tree": tree,
        "pins": step.externals,
        "externals": ctx.externals,
        **{key: metrics.pop(key, None) for key in _MEASURED},
        "metrics": metrics,
        "derived": ctx.derived,
        "seed": run.seed,
        "attempts": attempts,
        "seconds": round(sum(attempt.get("seconds") or 0 for attempt in attempts), 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "code": step.code,
        **run.environment.record(),
        "run": run.name,
        "published": now(),
    }


# Numbers of the execution, not of the result.
_MEASURED = ("tokens_per_second", "data_wait_frac")
_INPUT_KEYS = {"step": "step", "artifact": "name", "rid": "rid", "tree": "tree"}


def _summary(manifest: Manifest) -> str:
    """Return the artifact's name, size and numbers in one line."""
    size = format_bytes(sum(file["bytes"] for file in manifest["outputs"]))
    numbers = [f"{key} {format_number(value)}" for key, value in manifest["metrics"].items()][:4]
    if manifest["tokens_per_second"]:
        numbers.append(f"{format_count(manifest['tokens_per_second'])} tok/s")
    return "  ".join([f"{manifest['name']} ({size})", *numbers])


@contextmanager
def _signals(run: Run) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into a request to stop; the second one leaves at once."""

    def request_stop(number: int, frame: object) -> None:
        if run.stop_signal is not None:
            # Everything on disk is whole at any moment, so nothing needs to be cleaned up.
            os._exit(128 + number)
        run.stop_signal = number
        run.say("stopping at the next iteration border (again: stop at once)")

    try:
        previous = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
