"""Making one step's artifact: run the stage in its work folder, look at what it left, publish it whole."""

from __future__ import annotations

import errno
import shutil
import time
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from mlxchat.config.secrets import redact
from mlxchat.config.wording import format_bytes, format_count, format_number, format_seconds
from mlxchat.errors import Interrupted, MlxchatError, StepFailed, StoreError
from mlxchat.runner.context import Context, Sections
from mlxchat.runner.externals import check_pins
from mlxchat.runner.passing import is_passing
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.progress import fill
from mlxchat.runner.run import Run
from mlxchat.runner.time_limit import TimeIsUp, TimeLimit
from mlxchat.runner.waiting import Waiting
from mlxchat.store import attempts as attempt_log
from mlxchat.store import locks
from mlxchat.store.bases import bases_of
from mlxchat.store.crash import crash_point
from mlxchat.store.environment import peak_array_bytes, peak_memory_bytes, reset_peak_memory
from mlxchat.store.fingerprint import plain_of
from mlxchat.store.integrity import find_damage
from mlxchat.store.records import Record, now
from mlxchat.store.shared import SharedArtifacts
from mlxchat.store.store import MEASURED, SCHEMA, Manifest, Store

# What a person has to mend before another try has a chance.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


def make(step: PlannedStep, store: Store, run: Run, folders: dict[str, Path], lineage: dict[str, Manifest]) -> Path:
    """Return the step's new artifact. The caller holds the lock.

    Args:
        step: what to make.
        store: where it goes.
        run: how, and where to report.
        folders: role → folder of the input.
        lineage: role → what the manifest records of it.

    Raises:
        Interrupted: a signal arrived; the stage has saved what it can go on from.
        StepFailed: the stage raised, took too long, or did not make what it promised.
        StoreError: an input is damaged, or the artifact cannot be written.
    """
    with ExitStack() as held:
        if "gpu" in step.stage.resources and run.uses_gpu():
            for device, token in locks.gpu_locks().items():
                waiting = Waiting(run, step.name, token, doing=f"has GPU {device}")
                held.enter_context(locks.hold(token, {"run": run.name, "step": step.name}, *waiting.calls))
        _check_inputs(step, folders, store)
        run.hooks.tell("on_start", **_facts(step, store, run))
        began = time.monotonic()
        try:
            place = _make(step, store, run, folders, lineage)
        except Interrupted:
            raise
        except Exception as error:
            run.hooks.tell("on_failure", error=str(error), **_facts(step, store, run))
            raise
        seconds = round(time.monotonic() - began, 3)
        run.hooks.tell("on_success", seconds=seconds, artifact=place.name, **_facts(step, store, run))
        return place


def _make(step: PlannedStep, store: Store, run: Run, folders: dict[str, Path], lineage: dict[str, Manifest]) -> Path:
    """Run the stage, again if what went wrong may pass, and publish what it made."""
    work = store.work(step.key)
    began = time.monotonic()
    tries = run.policy.retry_attempts
    for number in range(1, tries + 1):
        try:
            ctx = _prepare(step, store, run, folders, lineage)
            attempt = _attempt(step, ctx, run, work)
            break
        except Exception as error:
            if isinstance(error, Interrupted):
                raise
            if number == tries or not is_passing(error):
                explained = _explained(error, step, run)
                if explained is error:
                    raise
                raise explained from error
            delay = run.policy.retry_seconds * 2 ** (number - 1)
            run.event("step_retries", step=step.name, error=_tell(error), attempt=number + 1, seconds=delay)
            run.say(redact(
                f"{step.name:<10} failed ({_tell(error)}), which may pass: "
                f"try {number + 1} of {tries} in {format_seconds(delay)}"
            ))  # fmt: skip
            _pause(delay, step, run)
    try:
        for path in (ctx.work / "records").glob("*.jsonl"):
            shutil.copyfile(path, ctx.out / path.name)
        attempt_log.finish(work, attempt, "done", None, ctx.resumed_from)
        crash_point("step.recorded")
        manifest = _describe(step, ctx, run, lineage, attempt_log.read(work))
        if not locks.owns(store.lock(step.key)):
            raise StoreError(
                f"{store.outputs} was removed or exchanged while {step.name} was made, and with it the lock that kept "
                "others from making it too. Nothing was published; run the same command again."
            )
        place = store.publish(ctx.out, step.label, manifest)
        made = store.made(step.key)
        assert made is not None, "it was recorded"
    except OSError as error:
        text = f"{step.name} was made but could not be published: {error.strerror or error}"
        text += f" ({error.filename or ctx.out})"
        with suppress(OSError):  # a full disk takes no notes either
            attempt_log.finish(work, attempt, "failed", text, ctx.resumed_from)
        raise StoreError(f"{text}. Mend that and run the same command again.") from error
    shutil.rmtree(work, ignore_errors=True)
    crash_point("step.cleaned")
    seconds = time.monotonic() - began
    run.event("step_done", step=step.name, artifact=place.name, seconds=seconds)
    run.say(fill(f"{step.name:<10} done in {format_seconds(seconds)}: {_summary(made)}"))
    return place


def _prepare(
    step: PlannedStep, store: Store, run: Run, folders: dict[str, Path], lineage: dict[str, Manifest]
) -> Context:
    """Return the context of an attempt, whose `out` is empty and whose `work` is what it can go on from."""
    work = store.work(step.key)
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    crash_point("step.prepared")
    return Context(
        step=step.name, stage=step.stage.name, inputs=folders, out=out,
        input_steps={role: made["step"] for role, made in lineage.items()},
        config=Sections(step.config, step.stage.config, step.stage.name),  # type: ignore[arg-type]
        work=work / "ckpt", root_seed=run.seed, root_data_seed=run.data_seed,
        hints=run.policy.hints, stop_signal=lambda: run.stop_signal, on_metrics=run.on_metrics,
        team=run.ranks.start(run, work / "ckpt") if run.ranks is not None and "gpu" in step.stage.resources else None,
        shared=SharedArtifacts(
            outputs=store.outputs, run=run.name, inputs=lineage, facts=run.environment.record, say=run.say
        ),
    )  # fmt: skip


def _attempt(step: PlannedStep, ctx: Context, run: Run, work: Path) -> int:
    """Run the stage once and note how that ended; return the attempt's number."""
    attempt = attempt_log.start(work, run.name, step.name)
    run.event("step_started", step=step.name, key=step.key, reason=step.reason)
    crash_point("step.started")
    run.say(f"{step.name:<10} starts ({step.reason})")
    reset_peak_memory()
    limit = TimeLimit(run.policy.timeouts.get(step.name))
    ctx.stop_signal = lambda: run.stop_signal or (15 if limit.passed else None)
    error: BaseException
    try:
        check_pins(step.name, step.externals, step.sections, "since it was planned", step.unread)
        with limit:
            step.stage.load()(ctx)
        crash_point("step.ran")
        try:
            check_pins(step.name, step.externals, step.sections, "while it ran", step.unread)
        except StepFailed:
            shutil.rmtree(ctx.work, ignore_errors=True)  # made from both the old and the new
            raise
        if missing := step.stage.missing_outputs(ctx.out):
            raise StepFailed(f"step {step.name} did not make {', '.join(missing)} ({ctx.out})")
        return attempt
    except Interrupted as stop:
        if run.stop_signal is not None or not limit.passed:
            with suppress(OSError):
                attempt_log.finish(work, attempt, "interrupted", str(stop), ctx.resumed_from)
            run.try_event("step_interrupted", step=step.name, error=str(stop))
            raise
        error = StepFailed(f"step {step.name} took longer than timeout.{step.name}={limit.seconds:g} seconds. {stop}")
    except TimeIsUp:
        error = StepFailed(
            f"step {step.name} took longer than timeout.{step.name}={limit.seconds:g} seconds, did not stop when asked "
            "to, and was ended."
        )
    except BaseException as raised:
        error = raised
    with suppress(OSError):
        attempt_log.finish(work, attempt, "failed", _tell(error), ctx.resumed_from)
    run.try_event("step_failed", step=step.name, error=_tell(error))
    raise error


def _explained(error: Exception, step: PlannedStep, run: Run) -> MlxchatError:
    """Return what is told of an error: itself if it is for people, else one that says where its traceback is."""
    if isinstance(error, MlxchatError):
        return error
    text = f"step {step.name} failed: {_tell(error)}"
    if isinstance(error, OSError) and error.errno in _DISK:
        text += "\nMend that and run the same command again: it continues from what was saved last."
    log = run.folder / f"{step.name}-error.log"
    with suppress(OSError):
        lines = traceback.format_exception(error)
        log.write_text(redact("".join(lines)), encoding="utf-8")
        text += f"\nTraceback: {log}"
    return StepFailed(redact(text))


def _pause(seconds: float, step: PlannedStep, run: Run) -> None:
    """Wait before another try, unless the run shall stop."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if run.stop_signal is not None:
            raise Interrupted(
                f"stopped before another try of {step.name}. The same command continues.", run.stop_signal
            )
        time.sleep(min(0.1, max(0.0, until - time.monotonic())))


def _check_inputs(step: PlannedStep, folders: dict[str, Path], store: Store) -> None:
    """Refuse inputs whose files, or those of what their weights rest on, are not those that were published."""
    for folder in folders.values():
        _check_input(step, folder, store)
    for folder in bases_of(folders):
        _check_input(step, folder, store)


def _check_input(step: PlannedStep, folder: Path, store: Store) -> None:
    if damage := list(find_damage(folder, store.manifest_of(folder), again=False)):
        raise StoreError(
            f"{folder}, which {step.name} needs, is damaged:\n" + "\n".join(damage[:5]) + "\n"
            "Remove the folder; the next run makes it again."
        )


def _describe(
    step: PlannedStep, ctx: Context, run: Run, lineage: dict[str, Manifest], attempts: list[Record]
) -> Manifest:
    """Return everything that the manifest says besides the contents."""
    metrics = dict(ctx.metrics)
    sections = {name: plain_of(section) for name, section in step.sections.items()}
    return {
        "schema": SCHEMA,
        "key": step.key,
        "stage": step.stage.name,
        "step": step.name,
        "kind": step.stage.produces,
        "version": step.stage.version,
        "config": step.identity,
        "excluded": _excluded(ctx, run),
        "full_config": sections,
        "overrides": run.overrides,
        "inputs": lineage,
        "pins": step.externals,
        "externals": ctx.externals,
        **{key: metrics.pop(key, None) for key in MEASURED},
        "metrics": metrics,
        "derived": ctx.derived,
        "seed": ctx.root_seed,
        "data_seed": ctx.root_seed if ctx.root_data_seed is None else ctx.root_data_seed,
        "attempts": attempts,
        "seconds": round(sum(attempt.get("seconds") or 0 for attempt in attempts), 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_array_bytes": peak_array_bytes(),
        "code": step.code,
        **run.environment.record(),
        "run": run.name,
        "published": now(),
    }


def _excluded(ctx: Context, run: Run) -> dict[str, Any]:
    """Return on what the step was made, which is no part of its identity."""
    found = {"machine": plain_of(run.config.machine)}
    return found | {"ranks": run.ranks.describe()} if run.ranks is not None and ctx.team is not None else found


def _summary(manifest: Manifest) -> str:
    """Return the artifact's name, size and numbers in one line."""
    size = format_bytes(sum(file["bytes"] for file in manifest["outputs"]))
    numbers = [f"{key} {format_number(value)}" for key, value in manifest["metrics"].items()][:4]
    if manifest["tokens_per_second"]:
        numbers.append(f"{format_count(manifest['tokens_per_second'])} tok/s")
    return "  ".join([f"{manifest['name']} ({size})", *numbers])


def _facts(step: PlannedStep, store: Store, run: Run) -> dict[str, str]:
    """Return what hooks are told."""
    return {
        "step": step.name, "stage": step.stage.name, "run": run.name, "key": step.key,
        "outputs": str(store.outputs.resolve()),
    }  # fmt: skip


def _tell(error: BaseException) -> str:
    return redact(f"{type(error).__name__}: {error}")
