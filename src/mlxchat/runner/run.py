"""Runs one step: lock, check again, run the stage, check its outputs, publish atomically."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxchat.config.secrets import redact
from mlxchat.config.wording import format_bytes, format_count, format_number, format_seconds
from mlxchat.distributed.ranks import begin_step
from mlxchat.errors import Interrupted, MlxchatError, StepFailed, StoreError
from mlxchat.runner.context import Context, Sections
from mlxchat.runner.keys import check_pins
from mlxchat.runner.plan import SAVED_CODE, PlannedStep, Verdict, judge
from mlxchat.runner.progress import fill
from mlxchat.store import attempts as attempt_log
from mlxchat.store import locks
from mlxchat.store.bases import bases_of
from mlxchat.store.crash import crash_point
from mlxchat.store.environment import Environment, peak_array_bytes, peak_memory_bytes, reset_peak_memory
from mlxchat.store.files import Record, Records, now, write_whole
from mlxchat.store.fingerprint import plain_of
from mlxchat.store.manifest import MEASURED, SCHEMA, Manifest, find_damage, read_manifest
from mlxchat.store.naming import links, runs
from mlxchat.store.shared import SharedArtifacts
from mlxchat.store.store import SAVED, Store

if TYPE_CHECKING:
    from mlxchat.config.schema import ExecutorConfig
    from mlxchat.distributed.team import Team


def ignore(step: str, record: Record) -> None:
    """Ignore a record: the run has no tracker."""


def _no_gpu() -> bool:
    """Return False: stages compute on a CPU."""
    return False


def _no_job(step: PlannedStep) -> Callable[[], None]:
    raise NotImplementedError("this run has no executors")


@dataclass(kw_only=True)
class Run:
    """One invocation."""

    folder: Path
    """outputs/runs/<run>."""
    seed: int
    data_seed: int | None = None
    """None: the same as the run's."""
    overrides: list[str]
    environment: Environment
    say: Callable[[str], None] = print
    """Prints a line."""
    on_metrics: Callable[[str, Record], None] = ignore
    """Called with step and record, for trackers."""
    executors: Mapping[str, ExecutorConfig] = field(default_factory=dict)
    """Step → executor, for steps that do not run here."""
    order: Callable[[PlannedStep], Callable[[], None]] = _no_job
    """Step → the call that completes it in a job, for `executors.submit`."""
    fail_fast: bool = False
    """Whether a failed step also stops steps that do not need it."""
    hints: Mapping[str, float] = field(default_factory=dict)
    """Facts about the whole run for steps: `Context.hints`."""
    uses_gpu: Callable[[], bool] = _no_gpu
    """Returns whether stages that declare `gpu` use one; may be slow, since it may load MLX."""
    becomes_latest: bool = True
    """Whether it becomes the latest run (store/naming.py) once it has finished a model."""
    team: Team | None = None
    """The ranks that compute steps that declare `gpu` together; None: this process alone."""
    stop_signal: int | None = field(default=None, init=False)
    """The signal that requested the run to stop, if any."""

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return self.folder.name

    def event(self, event: str, **details: Any) -> None:
        """Add a line to events.jsonl."""
        Records(self.folder / "events.jsonl").append({"time": now(), "event": event, **details})

    def request_stop(self, number: int) -> None:
        """Record the signal that requests the run to stop."""
        self.stop_signal = self.stop_signal or number

    def announce_stop(self) -> None:
        """Announce that the run will stop."""
        self.say("stopping after the current iteration (again: stop at once)")

    def try_event(self, event: str, **details: Any) -> None:
        """Add a line to events.jsonl if possible: the error may be about the disk."""
        with suppress(OSError):
            self.event(event, **details)


_INPUT_KEYS = {"step": "step", "artifact": "name", "rid": "rid", "tree": "tree"}


def find_done(step: PlannedStep, store: Store, run: Run, planned: dict[str, PlannedStep]) -> Path | None:
    """Return the step's artifact if it is done. Its inputs exist, so its key is final from here on."""
    store.forget()
    step.identify(store, planned)
    return _look(step, store, run, planned, forced=False) if step.artifact and not step.forced else None


def complete(step: PlannedStep, store: Store, run: Run, planned: dict[str, PlannedStep]) -> Path:
    """Make the artifact of a step that `find_done` did not find, unless another process does so first; return it.

    Raises:
        MlxchatError: it could not be made, here or in the other process.
    """
    work, lock = store.work(step.key), store.lock(step.key)
    known = attempt_log.ended(work)
    waiting = Waiting(run, step.name, lock, doing="is making it", work=work)
    with locks.hold(lock, {"run": run.name, "step": step.name, "key": step.key}, *waiting.calls) as waited:
        crash_point("step.locked")
        if waited:
            error = attempt_log.new_failure(work, known)
            if error is not None:
                raise StepFailed(f"step {step.name} failed in another process: {error}")
        # Another process may have finished it while we waited for the lock.
        store.forget()
        step.identify(store, planned)
        place = _look(step, store, run, planned, forced=step.forced and not waited)
        if place is None:
            collector = store.outputs / "locks" / "gc.lock"
            looking = Waiting(run, step.name, collector, doing="is collecting garbage")
            # gc begins only while no step's lock is held, so it cannot begin after this.
            with locks.hold(collector, {"step": step.name}, *looking.calls):
                pass
            place = _Making(step, store, run, *_find_inputs(step, store, planned)).make()
        step.take(store.made(step.key))
        step.verdict = Verdict(state="done")  # for downstream steps
        return place


def _look(step: PlannedStep, store: Store, run: Run, planned: dict[str, PlannedStep], *, forced: bool) -> Path | None:
    """Judge a step; return its artifact if it is done."""
    step.verdict = judge(step, store, forced=forced, planned=planned)
    place = store.find(step.rid) if step.done else None
    if place is not None:
        run.event("step_cached", step=step.name, artifact=place.name, rid=step.rid)
    return place


def _find_inputs(
    step: PlannedStep, store: Store, planned: dict[str, PlannedStep]
) -> tuple[dict[str, Path], dict[str, Manifest]]:
    """Return role → folder, and role → the manifest's entry for the input.

    Raises:
        StoreError: an input has disappeared.
    """
    folders: dict[str, Path] = {}
    lineage: dict[str, Manifest] = {}
    for role, manifest in step.inputs_made(store, planned).items():
        folder = store.find(manifest["rid"])
        if folder is None:
            raise StoreError(f"{manifest['name']}, which {step.name} needs as {role}, is no longer in {store.outputs}")
        folders[role] = folder
        lineage[role] = {key: manifest[source] for key, source in _INPUT_KEYS.items()}
    return folders, lineage


# Errors that persist until a user fixes their cause.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


@dataclass
class _Making:
    """Makes a step's artifact while this process holds the step's lock."""

    step: PlannedStep
    store: Store
    run: Run
    folders: dict[str, Path]
    """Role → folder of the input."""
    lineage: dict[str, Manifest]
    """Role → the manifest's entry for the input."""

    def __post_init__(self) -> None:
        """Set the work folder."""
        self.work = self.store.work(self.step.key)

    def make(self) -> Path:
        """Make and return the new artifact.

        Raises:
            Interrupted: a signal arrived; the stage has saved its state.
            StepFailed: the stage raised, or did not write the declared outputs.
            StoreError: an input is damaged, or the artifact cannot be written.
        """
        step, run = self.step, self.run
        with ExitStack() as held:
            if step.stage.uses_gpu and run.uses_gpu():
                for device, token in locks.gpu_locks().items():
                    waiting = Waiting(run, step.name, token, doing=f"has GPU {device}")
                    held.enter_context(locks.hold(token, {"run": run.name, "step": step.name}, *waiting.calls))
            self._check_inputs()
            began = time.monotonic()
            place, made = self._publish(*self._run_stage())
            shutil.rmtree(self.work, ignore_errors=True)
            crash_point("step.cleaned")
            seconds = time.monotonic() - began
            run.event("step_done", step=step.name, artifact=place.name, seconds=seconds)
            run.say(fill(f"{step.name:<10} done in {format_seconds(seconds)}: {summarise(made)}"))
            return place

    def _check_inputs(self) -> None:
        """Refuse damaged inputs, including the models that their weights depend on."""
        for folder in [*self.folders.values(), *bases_of(self.folders)]:
            if damage := list(find_damage(folder, self.store.manifest_of(folder), again=False)):
                raise StoreError(
                    f"{folder}, which {self.step.name} needs, is damaged:\n" + "\n".join(damage[:5]) + "\n"
                    "Remove the folder; the next run recomputes it."
                )

    def _run_stage(self) -> tuple[Context, int]:
        """Run the stage, with an empty `out` and the saved state of earlier attempts; return context and attempt.

        How it ended is recorded.
        """
        step, run, out = self.step, self.run, self.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        if step.code_policy == "strict" and step.drift_of_saved(self.store):
            shutil.rmtree(self.work / "ckpt")
        if not (self.work / "ckpt").exists():
            write_whole(self.work / SAVED_CODE, json.dumps(step.code["modules"]), durable=False)
        crash_point("step.prepared")
        ctx = self._context(out)
        self._name_intermediate()
        if step.stage.uses_gpu and (cause := attempt_log.explain_killed(self.work)):
            run.say(f"{step.name:<10} the last attempt ended without a record: {cause}")
        attempt = attempt_log.start(self.work, run.name, step.name)
        run.event("step_started", step=step.name, key=step.key, reason=step.reason)
        crash_point("step.started")
        run.say(f"{step.name:<10} starts ({step.reason})")
        reset_peak_memory()
        try:
            check_pins(step.name, step.externals, step.sections, "since it was planned", step.unread)
            step.stage.load()(ctx)
            crash_point("step.ran")
            try:
                check_pins(step.name, step.externals, step.sections, "while it ran", step.unread)
            except StepFailed:
                shutil.rmtree(ctx.work, ignore_errors=True)  # made from a mixture of old and new data
                raise
            if missing := step.stage.missing_outputs(ctx.out):
                raise StepFailed(f"step {step.name} did not make {', '.join(missing)} ({ctx.out})")
            return ctx, attempt
        except Interrupted as stop:
            with suppress(OSError):
                attempt_log.finish(self.work, attempt, "interrupted", str(stop), ctx.resumed_from)
            run.try_event("step_interrupted", step=step.name, error=str(stop))
            raise
        except BaseException as error:
            with suppress(OSError):
                attempt_log.finish(self.work, attempt, "failed", _tell(error), ctx.resumed_from)
            run.try_event("step_failed", step=step.name, error=_tell(error))
            if isinstance(error, MlxchatError) or not isinstance(error, Exception):
                raise
            raise self._failure(error) from error  # a stage may raise anything

    def _context(self, out: Path) -> Context:
        """Return the stage's context."""
        step, run, work = self.step, self.run, self.work / "ckpt"
        team = run.team if step.stage.uses_gpu else None
        if team is not None:
            begin_step(team, step.config.machine)
        ctx = Context(
            step=step.name, stage=step.stage.name, inputs=self.folders, out=out,
            config=Sections(step.config, step.stage.config, step.stage.name),  # type: ignore[arg-type]  # it acts as a Config
            work=work, root_seed=run.seed, root_data_seed=run.data_seed,
            hints=run.hints, stop_signal=lambda: run.stop_signal, on_metrics=run.on_metrics,
            publisher=lambda *model: self._publish_intermediate(ctx, *model), check_lock=self._check_lock,
            team=team,
            shared=SharedArtifacts(
                outputs=self.store.outputs, run=run.name, inputs=self.lineage, facts=run.environment.record, say=run.say
            ),
        )  # fmt: skip
        return ctx

    def _name_intermediate(self) -> None:
        """Add refs to this run for the intermediate models of the training that it continues.

        They are found by their keys in the refs of all runs: attempts.jsonl, which names the runs, may be damaged.
        """
        if not (self.work / "ckpt").exists():
            return
        contents = {role: made["tree"] for role, made in self.lineage.items()}
        for run in runs(self.store):
            for name, place in links(self.store, run).items():
                step, _, iteration = name.rpartition(SAVED)
                if step != self.step.name or not iteration.isdecimal():
                    continue
                if read_manifest(place)["key"] == self.step.key_with(contents, int(iteration)):
                    self.store.set_ref(self.run.name, name, place)

    def _publish_intermediate(
        self, ctx: Context, iteration: int, write: Callable[[Path], None], derived: Mapping[str, Any]
    ) -> str:
        """Publish a model for `Context.publish`, named refs/<run>/<step>@<iteration>.

        Its key is the step's key plus the iteration, so it changes neither the step's key nor its artifact.
        """
        step, store = self.step, self.store
        contents = {role: made["tree"] for role, made in self.lineage.items()}
        key = step.key_with(contents, iteration)
        began = attempt_log.read(self.work)[0]["started"]
        store.forget()
        made = store.made(key)
        if made is None or made["attempts"][0]["started"] != began:  # not yet published by an earlier attempt
            out = self.work / "intermediate"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            write(out)
            for path in (ctx.work / "records").glob("*.jsonl"):
                shutil.copyfile(path, out / path.name)
            if missing := step.stage.missing_outputs(out):
                raise StepFailed(f"step {step.name} did not make {', '.join(missing)} after iteration {iteration}")
            manifest = self._describe(ctx) | {"key": key, "step": f"{step.name}{SAVED}{iteration}"}
            manifest["config"] = {**step.identity, "iteration": iteration}
            own: dict[str, Any] = {}  # metrics of earlier iterations are not this model's
            for record in ctx.records("metrics").read():
                own |= record if record.get("iteration") == iteration else {}
            manifest["metrics"] = {name: own[name] for name in ctx.metrics if math.isfinite(own.get(name, math.nan))}
            manifest["derived"] = dict(derived)
            self._check_lock()
            store.publish(out, f"{step.label}_{iteration}", manifest)
            shutil.rmtree(store.work(key), ignore_errors=True)
            made = store.made(key)
            assert made is not None, "it was just published"
            self.run.event("model_published", step=step.name, iteration=iteration, artifact=made["name"])
        store.set_ref(self.run.name, made["step"], store.outputs / "store" / made["name"])
        return str(made["name"])

    def _check_lock(self) -> None:
        """Refuse to save or publish if another process may make the same.

        Raises:
            StoreError: the lock was removed.
        """
        if not locks.owns(self.store.lock(self.step.key)):
            raise StoreError(
                f"{self.store.outputs} was removed or exchanged while {self.step.name} was made, and with it the lock "
                "that kept others from making it too. Nothing was published; run the same command again."
            )

    def _publish(self, ctx: Context, attempt: int) -> tuple[Path, Manifest]:
        """Publish the stage's outputs; return the artifact and its manifest.

        Raises:
            StoreError: publishing failed.
        """
        step, store = self.step, self.store
        try:
            for path in (ctx.work / "records").glob("*.jsonl"):
                shutil.copyfile(path, ctx.out / path.name)
            attempt_log.finish(self.work, attempt, "done", None, ctx.resumed_from)
            crash_point("step.recorded")
            manifest = self._describe(ctx)
            self._check_lock()
            place = store.publish(ctx.out, step.label, manifest)
            made = store.made(step.key)
            if made is None:
                raise StoreError(
                    f"{store.outputs} was removed or exchanged while {step.name} was published; "
                    "run the same command again."
                )
            return place, made
        except OSError as error:
            text = f"{step.name} was made but could not be published: {error.strerror or error}"
            text += f" ({error.filename or ctx.out})"
            with suppress(OSError):  # a full disk accepts no records either
                attempt_log.finish(self.work, attempt, "failed", text, ctx.resumed_from)
            raise StoreError(f"{text}. Fix that and run the same command again.") from error

    def _describe(self, ctx: Context) -> Manifest:
        """Return the manifest's fields other than the contents."""
        step, run = self.step, self.run
        metrics, attempts = dict(ctx.metrics), attempt_log.read(self.work)
        excluded: dict[str, Any] = {"machine": plain_of(step.config.machine)}
        if ctx.team is not None:
            excluded["ranks"] = ctx.team.describe()
        return {
            "schema": SCHEMA,
            "key": step.key,
            "stage": step.stage.name,
            "step": step.name,
            "kind": step.stage.produces,
            "version": step.stage.version,
            "config": step.identity,
            "excluded": excluded,
            "full_config": {name: plain_of(section) for name, section in step.sections.items()},
            "overrides": run.overrides,
            "inputs": self.lineage,
            "pins": step.externals,
            "externals": ctx.externals,
            **{key: metrics.pop(key, None) for key in MEASURED},
            "metrics": metrics,
            "derived": ctx.derived,
            "seed": run.seed,
            "data_seed": run.seed if run.data_seed is None else run.data_seed,
            "attempts": attempts,
            "seconds": round(sum(attempt.get("seconds") or 0 for attempt in attempts), 3),
            "peak_memory_bytes": peak_memory_bytes(),
            "peak_array_bytes": peak_array_bytes(),
            "code": step.code,
            **run.environment.record(),
            "run": run.name,
            "published": now(),
        }

    def _failure(self, error: Exception) -> StepFailed:
        """Return the message about an unexpected error, with the path of its traceback."""
        text = f"step {self.step.name} failed: {_tell(error)}"
        if _disk_errno(error) is not None:
            place = self.store.outputs.resolve()
            text += f"\nFix that in {place} and run the same command again: it continues from the last saved state."
            return StepFailed(redact(text))
        log = self.run.folder / f"{self.step.name}-error.log"
        with suppress(OSError):
            log.write_text(redact("".join(traceback.format_exception(error))), encoding="utf-8")
            text += f"\nTraceback: {log}"
        return StepFailed(redact(text))


def summarise(manifest: Manifest) -> str:
    """Return the artifact's name, size and metrics in one line."""
    size = format_bytes(sum(file["bytes"] for file in manifest["outputs"]))
    numbers = [f"{key} {format_number(value)}" for key, value in manifest["metrics"].items()][:4]
    if manifest["tokens_per_second"]:
        numbers.append(f"{format_count(manifest['tokens_per_second'])} tok/s")
    return "  ".join([f"{manifest['name']} ({size})", *numbers])


def _tell(error: BaseException) -> str:
    number = None if isinstance(error, OSError) else _disk_errno(error)
    return redact(f"{type(error).__name__}: {error}" if number is None else f"{os.strerror(number)} while saving")


def _disk_errno(error: BaseException) -> int | None:
    """Return the errno of a disk that is full or fails, else None. safetensors' writer has it in its message only."""
    found = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    number = int(found[1]) if found else getattr(error, "errno", None)
    return number if number in _DISK else None


REFRESH_SECONDS = 10.0


class Waiting:
    """Prints which process a step waits for and its progress; ends the wait if the run is to stop."""

    def __init__(self, run: Run, step: str, lock: Path, *, doing: str, work: Path | None = None) -> None:
        """Prepare to wait for a lock; `doing` describes its holder's work, whose iterations are read from `work`."""
        self.run, self.step, self.lock, self.doing, self.work = run, step, lock, doing, work
        self._said = ""
        self._looked = time.monotonic()

    @property
    def calls(self) -> tuple[Callable[[dict[str, Any]], None], Callable[[], None]]:
        """Return the arguments `on_wait` and `check` of `locks.hold`."""
        return self._begin, self._look

    def _begin(self, owner: dict[str, Any]) -> None:
        self.run.event("step_waits", step=self.step, owner=owner)
        self._say(owner)

    def _look(self) -> None:
        if self.run.stop_signal is not None:
            raise Interrupted(f"stopped while {self.step} waited. The same command continues.", self.run.stop_signal)
        if time.monotonic() - self._looked >= REFRESH_SECONDS:
            self._looked = time.monotonic()
            self._say(locks.read_owner(self.lock))

    def _say(self, owner: dict[str, Any]) -> None:
        who = f"{locks.name_process(owner)} (run {owner.get('run', '?')})"
        iteration = attempt_log.iteration(self.work) if self.work is not None else None
        line = f"{self.step:<10} waits: {who} {self.doing}" + (f", at iteration {iteration}" if iteration else "")
        if line != self._said:
            self._said = line
            self.run.say(line)
