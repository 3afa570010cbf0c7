"""Runs one step: lock, judge again, run the stage, check its outputs, publish atomically."""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxchat.config.wording import format_bytes, format_count, format_number, format_seconds
from mlxchat.distributed.ranks import begin_step
from mlxchat.errors import Interrupted, MlxchatError, StepFailed, StoreError, redact
from mlxchat.runner.context import Context, Sections
from mlxchat.runner.keys import check_pins
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.process import Environment, peak_array_bytes, peak_memory_bytes, reset_peak_memory
from mlxchat.store import locks
from mlxchat.store.catalog import bases_of
from mlxchat.store.files import Record, Records, crash_point, now
from mlxchat.store.fingerprint import plain_of
from mlxchat.store.manifest import MEASURED, SCHEMA, Manifest, find_damage
from mlxchat.store.store import SAVED, SharedArtifacts, Store

if TYPE_CHECKING:
    from mlxchat.distributed.team import Team

# Errors that persist until a user fixes their cause.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
_INPUT_KEYS = {"step": "step", "artifact": "name", "rid": "rid", "tree": "tree"}


@dataclass(kw_only=True)
class Run:
    """One invocation."""

    folder: Path  # outputs/runs/<run>
    seed: int
    data_seed: int
    overrides: list[str]
    environment: Environment
    say: Callable[[str], None] = print
    on_metrics: Callable[[str, Record], None] = lambda step, record: None  # for trackers
    fail_fast: bool = False  # whether a failed step also stops steps that do not need it
    hints: Mapping[str, float] = field(default_factory=dict)  # Context.hints
    uses_gpu: Callable[[], bool] = lambda: False  # whether stages that declare `uses_gpu` use one; may load MLX
    team: Team | None = None  # the ranks that compute steps that declare `uses_gpu` together
    stop_signal: int | None = field(default=None, init=False)  # the signal that requested the run to stop

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return self.folder.name

    def event(self, event: str, **details: Any) -> None:
        """Add a line to events.jsonl, if the disk accepts it."""
        with suppress(OSError):
            Records(self.folder / "events.jsonl").append({"time": now(), "event": event, **details})

    def request_stop(self, number: int) -> None:
        """Record the signal that requests the run to stop."""
        self.stop_signal = self.stop_signal or number

    def announce_stop(self) -> None:
        """Announce that the run will stop."""
        self.say("stopping after the current iteration (again: stop at once)")


def find_done(
    step: PlannedStep, store: Store, run: Run, planned: dict[str, PlannedStep], *, forced: bool
) -> Path | None:
    """Judge a step whose inputs exist; return its artifact if it is done."""
    store.forget()
    step.judge(store, planned, forced=forced)
    place = store.find(step.rid) if step.done else None
    if place is not None:
        run.event("step_cached", step=step.name, artifact=place.name, rid=step.rid)
    return place


def complete(step: PlannedStep, store: Store, run: Run, planned: dict[str, PlannedStep]) -> Path:
    """Make the artifact of a step, unless another process does so first; return it."""
    work, lock = store.work(step.key), store.lock(step.key)
    with _hold(run, step, lock, "is making it", work) as waited:
        crash_point("step.locked")
        last = locks.read_attempts(work)[-1:] if waited else []
        if last and last[0]["outcome"] == "failed":
            raise StepFailed(f"step {step.name} failed in another process: {last[0]['error']}")
        place = find_done(step, store, run, planned, forced=step.forced and not waited)
        if place is None:
            # gc begins only while no step's lock is held, so it cannot begin after this.
            with _hold(run, step, store.outputs / "locks" / "gc.lock", "is collecting garbage"):
                pass
            place = _Attempt(step, store, run, step.inputs_made(store, planned)).make()
        step.state = "done"  # for downstream steps
        return place


@contextmanager
def _hold(run: Run, step: PlannedStep, lock: Path, doing: str, work: Path | None = None) -> Iterator[bool]:
    """Hold a lock for a step; yield whether another process held it first.

    A waiting step says who holds it, what that process is `doing` and how far it is (in `work`), and ends with the run.
    """

    def begin(owner: dict[str, Any]) -> None:
        run.event("step_waits", step=step.name, owner=owner)
        record = Records(work / "ckpt" / "records" / "metrics.jsonl").last() if work is not None else {}
        far = f", at iteration {record['iteration']}" if record.get("iteration") else ""
        run.say(f"{step.name:<10} waits: {locks.name_process(owner)} (run {owner.get('run', '?')}) {doing}{far}")

    def look() -> None:
        if run.stop_signal is not None:
            raise Interrupted(f"stopped while {step.name} waited. The same command continues.", run.stop_signal)

    with locks.hold(lock, {"run": run.name, "step": step.name, "key": step.key}, begin, look) as waited:
        yield waited


class _Attempt:
    """One execution of a step, by the process that holds the step's lock."""

    def __init__(self, step: PlannedStep, store: Store, run: Run, inputs: dict[str, Manifest]) -> None:
        self.step, self.store, self.run = step, store, run
        self.work, self.number = store.work(step.key), 0
        self.lineage = {role: {key: made[of] for key, of in _INPUT_KEYS.items()} for role, made in inputs.items()}
        self.contents = {role: made["tree"] for role, made in inputs.items()}
        shared = SharedArtifacts(
            outputs=store.outputs, run=run.name, inputs=self.lineage, facts=run.environment.record, say=run.say
        )
        self.ctx = Context(
            step=step.name, stage=step.stage.name, out=self.work / "out", work=self.work / "ckpt",
            inputs={role: store.outputs / "store" / made["name"] for role, made in inputs.items()},
            config=Sections(step.config, step.stage.config, step.stage.name),  # type: ignore[arg-type]  # it acts as a Config
            root_seed=run.seed, root_data_seed=run.data_seed, hints=run.hints, stop_signal=lambda: run.stop_signal,
            on_metrics=run.on_metrics, publish=self._publish_intermediate, check_lock=self._check_lock,
            encoded=shared.obtain, team=run.team if step.stage.uses_gpu else None,
        )  # fmt: skip

    def make(self) -> Path:
        """Make and return the new artifact."""
        step, run = self.step, self.run
        with ExitStack() as held:
            for device, token in locks.gpu_locks().items() if step.stage.uses_gpu and run.uses_gpu() else ():
                held.enter_context(_hold(run, step, token, f"has GPU {device}"))
            self._check_inputs()
            began = time.monotonic()
            self._prepare()
            self._run_stage()
            place, made = self._publish()
            shutil.rmtree(self.work, ignore_errors=True)
            crash_point("step.cleaned")
            seconds = time.monotonic() - began
            run.event("step_done", step=step.name, artifact=place.name, seconds=seconds)
            run.say(f"{step.name:<10} done in {format_seconds(seconds)}: {summarise(made)}")
            return place

    def _check_inputs(self) -> None:
        """Refuse damaged inputs, including the bases of adapters."""
        for folder in [*self.ctx.inputs.values(), *bases_of(self.ctx.inputs)]:
            if damage := list(find_damage(folder, self.store.manifest_of(folder), again=False)):
                text = f"{folder}, which {self.step.name} needs, is damaged:"
                raise StoreError("\n".join([text, *damage[:5], "Remove the folder; the next run recomputes it."]))

    def _prepare(self) -> None:
        """Empty `out`, keep the saved state of earlier attempts, and record that this one starts."""
        step, run, ctx = self.step, self.run, self.ctx
        shutil.rmtree(ctx.out, ignore_errors=True)
        ctx.out.mkdir(parents=True)
        crash_point("step.prepared")
        if ctx.team is not None:
            begin_step(ctx.team, step.config.machine)
        if step.stage.uses_gpu and (cause := locks.explain_killed(self.work)):
            run.say(f"{step.name:<10} the last attempt ended without a record: {cause}")
        self.number = locks.start_attempt(self.work, run.name, step.name)
        run.event("step_started", step=step.name, key=step.key, reason=step.reason)
        crash_point("step.started")
        run.say(f"{step.name:<10} starts ({step.reason})")
        reset_peak_memory()

    def _run_stage(self) -> None:
        """Run the stage and check its outputs; record how it ended otherwise."""
        step, run, ctx = self.step, self.run, self.ctx
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
        except BaseException as error:
            outcome = "interrupted" if isinstance(error, Interrupted) else "failed"
            text = _describe_error(error)
            with suppress(OSError):
                locks.finish_attempt(self.work, self.number, outcome, text, ctx.resumed_from)
            run.event(f"step_{outcome}", step=step.name, error=text)
            if isinstance(error, MlxchatError) or not isinstance(error, Exception):
                raise
            raise self._failure(error) from error  # a stage may raise anything

    def _publish(self) -> tuple[Path, Manifest]:
        """Publish the stage's outputs; return the artifact and its manifest."""
        step, store, ctx = self.step, self.store, self.ctx
        try:
            self._copy_records(ctx.out)
            locks.finish_attempt(self.work, self.number, "done", None, ctx.resumed_from)
            crash_point("step.recorded")
            manifest = self._describe()
            self._check_lock()
            place = store.publish(ctx.out, step.label, manifest)
        except OSError as error:
            text = f"{step.name} was made but could not be published: {error.strerror or error}"
            text += f" ({error.filename or ctx.out})"
            with suppress(OSError):  # a full disk accepts no records either
                locks.finish_attempt(self.work, self.number, "failed", text, ctx.resumed_from)
            raise StoreError(f"{text}. Fix that and run the same command again.") from error
        made = store.made(step.key)
        if made is None:
            raise StoreError(f"{store.outputs} was removed or exchanged while {step.name} was published.")
        return place, made

    def _publish_intermediate(self, iteration: int, write: Callable[[Path], None], derived: Mapping[str, Any]) -> str:
        """Publish a model for `Context.publish`, named refs/<run>/<step>@<iteration>; its key has the iteration."""
        step, store, ctx = self.step, self.store, self.ctx
        key = step.key_with(self.contents, iteration)
        began = locks.read_attempts(self.work)[0]["started"]
        store.forget()
        made = store.made(key)
        if made is None or made["attempts"][0]["started"] != began:  # not yet published by an earlier attempt
            out = self.work / "intermediate"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            write(out)
            self._copy_records(out)
            if missing := step.stage.missing_outputs(out):
                raise StepFailed(f"step {step.name} did not make {', '.join(missing)} after iteration {iteration}")
            own: dict[str, Any] = {}  # metrics of earlier iterations are not this model's
            for record in ctx.records("metrics").read():
                own |= record if record.get("iteration") == iteration else {}
            manifest = self._describe() | {
                "key": key, "step": f"{step.name}{SAVED}{iteration}",
                "config": {**step.identity, "iteration": iteration}, "derived": dict(derived),
                "metrics": {name: own[name] for name in ctx.metrics if math.isfinite(own.get(name, math.nan))},
            }  # fmt: skip
            self._check_lock()
            store.publish(out, f"{step.label}_{iteration}", manifest)
            shutil.rmtree(store.work(key), ignore_errors=True)
            made = store.made(key)
            assert made is not None, "it was just published"
            self.run.event("model_published", step=step.name, iteration=iteration, artifact=made["name"])
        store.set_ref(self.run.name, made["step"], store.outputs / "store" / made["name"])
        return str(made["name"])

    def _copy_records(self, out: Path) -> None:
        for path in (self.ctx.work / "records").glob("*.jsonl"):
            shutil.copyfile(path, out / path.name)

    def _check_lock(self) -> None:
        """Raise a StoreError if the lock was removed, so that another process may make the same."""
        if not locks.owns(self.store.lock(self.step.key)):
            lost = f"{self.store.outputs} was removed or exchanged while {self.step.name} was made, with its lock"
            raise StoreError(f"{lost}. Nothing was published; run the same command again.")

    def _describe(self) -> Manifest:
        """Return the manifest's fields other than the contents."""
        step, run, ctx = self.step, self.run, self.ctx
        metrics, attempts = dict(ctx.metrics), locks.read_attempts(self.work)
        ranks = {"ranks": ctx.team.describe()} if ctx.team is not None else {}
        return {
            "schema": SCHEMA, "key": step.key, "stage": step.stage.name, "step": step.name,
            "kind": step.stage.produces, "version": step.stage.version, "config": step.identity,
            "excluded": {"machine": plain_of(step.config.machine), **ranks},
            "full_config": {name: plain_of(section) for name, section in step.sections.items()},
            "overrides": run.overrides, "inputs": self.lineage, "pins": step.externals, "externals": ctx.externals,
            **{key: metrics.pop(key, None) for key in MEASURED}, "metrics": metrics, "derived": ctx.derived,
            "seed": run.seed, "data_seed": run.data_seed, "attempts": attempts,
            "seconds": round(sum(attempt.get("seconds") or 0 for attempt in attempts), 3),
            "peak_memory_bytes": peak_memory_bytes(), "peak_array_bytes": peak_array_bytes(),
            "code": step.code, **run.environment.record(), "run": run.name, "published": now(),
        }  # fmt: skip

    def _failure(self, error: Exception) -> StepFailed:
        """Return the message about an unexpected error, with the path of its traceback."""
        text = f"step {self.step.name} failed: {_describe_error(error)}"
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
    numbers += [f"{format_count(speed)} tok/s"] if (speed := manifest["tokens_per_second"]) else []
    return "  ".join([f"{manifest['name']} ({size})", *numbers])


def _describe_error(error: BaseException) -> str:
    if isinstance(error, Interrupted):
        return str(error)
    number = None if isinstance(error, OSError) else _disk_errno(error)
    return redact(f"{type(error).__name__}: {error}" if number is None else f"{os.strerror(number)} while saving")


def _disk_errno(error: BaseException) -> int | None:
    """Return the errno of a disk that is full or fails, else None. safetensors' writer has it in its message only."""
    found = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    number = int(found[1]) if found else getattr(error, "errno", None)
    return number if number in _DISK else None
