"""Many steps: which is next, here or in processes of their own, and what becomes of the others when one fails."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mlxchat import errors
from mlxchat.config.secrets import redact
from mlxchat.errors import Interrupted, MlxchatError, StepFailed, StoreError
from mlxchat.runner.plan import PlannedStep, Verdict
from mlxchat.runner.process import SIGNALS, Hooks, keep_awake, stop_on_signals
from mlxchat.runner.run import Policy, Run, complete, find_done
from mlxchat.store.environment import Environment
from mlxchat.store.files import Record, write_whole
from mlxchat.store.naming import LATEST, MODEL
from mlxchat.store.store import Store

_LOOK_SECONDS = 0.2
_PRINTER_SECONDS = 5.0


def execute(plan: list[PlannedStep], store: Store, run: Run) -> None:
    """Run what the plan says is not done, and point the refs of this run at every step's artifact.

    A run that finishes a model becomes the latest one.

    A step that fails takes those with it that need it. The others go on, unless the run shall fail fast.

    Raises:
        Interrupted: a signal arrived; everything finished so far is kept, the current steps can continue.
        MlxchatError: what a step raised; StepFailed if several did.
        StoreError: the outputs folder can no longer be written.
    """
    for step in plan:
        _ = step.code  # looked at now: an edit while the first steps run is not what later ones are made with
    if plan and plan[0].digests is not None:
        plan[0].digests.save()  # again: there may have been no outputs folder when they were planned
    outcome = Outcome(plan, store, run)
    try:
        run.event("run_started", steps=[step.name for step in plan])
        with keep_awake():
            if run.policy.max_parallel_steps > 1:
                _execute_in_processes(outcome)
            else:
                _execute_here(outcome)
        outcome.conclude()
    except OSError as error:
        raise StoreError(
            f"outputs folder {store.outputs} can no longer be used ({error.strerror or error}: {error.filename}). "
            "What is in it is whole. Mend that and run the same command again: it continues."
        ) from error
    except MlxchatError as error:
        run.try_event("run_failed", step=outcome.last_step(), error=str(error))
        raise
    finally:
        run.hooks.finish()
    run.event("run_done")


def _execute_here(outcome: Outcome) -> None:
    """Complete one step after the other in this process."""
    plan, run = outcome.plan, outcome.run

    leave = run.ranks.kill if run.ranks is not None else lambda: None
    with stop_on_signals(run.request_stop, run.announce_stop, leave):
        for step in plan:
            if outcome.must_skip(step):
                continue
            try:
                place = find_done(step, outcome.store, run, outcome.planned)
                outcome.note(step)
                place = place or complete(step, outcome.store, run, outcome.planned)
            except (Interrupted, StoreError):
                outcome.current = step.name
                raise
            except MlxchatError as error:
                outcome.fail(step, error)
                if run.policy.fail_fast or (run.ranks is not None and run.ranks.is_broken):
                    return
                continue
            outcome.finish(step, place)
            # A stage need not look at signals: then the run stops between its steps.
            if run.stop_signal is not None and step is not plan[-1]:
                raise Interrupted(f"stopped after {step.name}. The same command continues from there.", run.stop_signal)


class Outcome:
    """What became of the steps of a run so far."""

    def __init__(self, plan: list[PlannedStep], store: Store, run: Run) -> None:
        """Begin with nothing done."""
        self.plan, self.store, self.run = plan, store, run
        self.planned = {step.name: step for step in plan}
        self.finished: set[str] = set()
        self.failures: dict[str, MlxchatError] = {}
        self.skipped: dict[str, str] = {}
        """Step → the one that failed."""
        self.current: str | None = None
        """The step that was at work when the run ended."""

    def finish(self, step: PlannedStep, place: Path) -> None:
        """Note a step's artifact and give it its names."""
        self.finished.add(step.name)
        self.store.set_ref(self.run.name, step.name, place)
        made = self.store.made(step.key)
        step.take(made)
        self.note(step)
        if step.stage.produces == MODEL and made is not None and made["run"] == self.run.name:
            self._become_latest()

    def note(self, step: PlannedStep) -> None:
        """Write a step's key, known once its inputs are there, and what it gave into plan.json."""
        path = self.run.folder / "plan.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"steps": []}
        for entry in record["steps"]:
            known = {"key": step.key, "rid": step.rid, "artifact": step.artifact}
            if entry["step"] == step.name and not known.items() <= entry.items():
                entry |= known
                write_whole(path, json.dumps(record, indent=1).encode() + b"\n")

    def fail(self, step: PlannedStep, error: MlxchatError) -> None:
        """Note that a step failed, and say so now if anything else goes on."""
        self.failures[step.name] = error
        self.current = step.name
        if not self.run.policy.fail_fast and any(self._goes_on(other) for other in self.plan):
            self.run.say(f"{step.name:<10} failed: {(str(error).splitlines() or ['?'])[0]} (other steps go on)")

    def must_skip(self, step: PlannedStep) -> bool:
        """Tell whether a step needs one that failed; it is noted and said once."""
        cause = next((self.cause_of(source) for source in step.inputs.values() if self.cause_of(source)), None)
        if cause is None:
            return False
        if step.name not in self.skipped:
            self.skipped[step.name] = cause
            self.run.event("step_skipped", step=step.name, failed=cause)
            self.run.say(f"{step.name:<10} is left out: {cause} failed")
        return True

    def cause_of(self, name: str) -> str | None:
        """Return the failed step because of which this one is not there."""
        return name if name in self.failures else self.skipped.get(name)

    def conclude(self) -> None:
        """Raise what went wrong, if anything did."""
        if len(self.failures) == 1:
            raise next(iter(self.failures.values()))
        if self.failures:
            lines = [f"{name}: {(str(error).splitlines() or ['?'])[0]}" for name, error in self.failures.items()]
            raise StepFailed(f"{len(lines)} steps failed:\n" + "\n".join(lines))
        if any(step.stage.produces == MODEL for step in self.plan):
            self._become_latest()

    def _become_latest(self) -> None:
        if self.run.becomes_latest:
            self.store.link_group(LATEST, self.run.name)

    def last_step(self) -> str | None:
        """Return the step that a failure of the run is about."""
        return self.current

    def _goes_on(self, step: PlannedStep) -> bool:
        if step.name in self.finished or step.name in self.failures:
            return False
        return not any(self._lost(source) for source in step.inputs.values())

    def _lost(self, name: str) -> bool:
        step = self.planned[name]
        return name in self.failures or any(self._lost(source) for source in step.inputs.values())


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a child is told."""

    step: str
    planned: dict[str, PlannedStep]
    outputs: Path
    folder: Path
    config: Any
    seed: int
    data_seed: int | None
    overrides: list[str]
    policy: Policy
    hooks: tuple[Any, Any, Any]
    uses_gpu: Callable[[], bool]
    environment: Environment


@dataclass(kw_only=True)
class _Child:
    """A step at work in another process."""

    step: PlannedStep
    process: BaseProcess
    messages: Connection
    printer: threading.Thread
    result: tuple[Any, ...] | None = None
    asked_to_stop: int = 0
    """The signal it was sent."""

    def stop(self, number: int) -> None:
        """Ask it, once, to save and end."""
        if not self.asked_to_stop and self.process.pid is not None:
            self.asked_to_stop = number
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, number)


def _execute_in_processes(outcome: Outcome) -> None:
    """Complete the steps of a plan, up to `max_parallel_steps` at a time, as soon as their inputs are there.

    Raises:
        Interrupted: a signal arrived; every step at work has saved what it can go on from.
        StoreError: the outputs folder cannot be used.
    """
    run, children = outcome.run, dict[str, _Child]()

    def leave() -> None:
        for child in children.values():
            child.process.kill()

    fatal: MlxchatError | None = None
    with stop_on_signals(run.request_stop, run.announce_stop, leave):
        try:
            while True:
                failing = fatal is not None or (run.policy.fail_fast and bool(outcome.failures))
                if run.stop_signal is not None or failing:
                    for child in children.values():
                        child.stop(run.stop_signal or signal.SIGTERM)
                else:
                    _start_what_is_ready(outcome, children)
                if not children:
                    break
                for child in _wait(children, run.on_metrics):
                    del children[child.step.name]
                    try:
                        _take_result(child, outcome)
                    except Interrupted as stop:
                        if run.stop_signal is not None:
                            fatal = fatal or stop
                    except StoreError as error:
                        outcome.current = child.step.name
                        fatal = error
        finally:
            for child in children.values():
                child.process.kill()
                _end(child)
    if fatal is not None:
        raise fatal
    if run.stop_signal is not None and len(outcome.finished) < len(outcome.plan) and not outcome.failures:
        raise Interrupted("stopped between two steps. The same command continues from there.", run.stop_signal)


def _start_what_is_ready(outcome: Outcome, children: dict[str, _Child]) -> None:
    """Start every step whose inputs are there, as far as there is room; what is done already needs no process."""
    for step in outcome.plan:
        if step.name in outcome.finished or step.name in outcome.failures or step.name in children:
            continue
        if outcome.must_skip(step) or any(source not in outcome.finished for source in step.inputs.values()):
            continue
        if len(children) >= outcome.run.policy.max_parallel_steps:
            return
        place = find_done(step, outcome.store, outcome.run, outcome.planned)
        outcome.note(step)
        if place is not None:
            outcome.finish(step, place)
        else:
            children[step.name] = _start(step, outcome)


def _start(step: PlannedStep, outcome: Outcome) -> _Child:
    run = outcome.run
    context = multiprocessing.get_context("spawn")
    messages, theirs = context.Pipe()
    printed, printing = context.Pipe(duplex=False)
    hooks = (run.hooks.on_start, run.hooks.on_success, run.hooks.on_failure)
    order = Order(
        step=step.name, planned=_needed(step, outcome.planned), outputs=outcome.store.outputs, folder=run.folder,
        config=run.config, seed=run.seed, data_seed=run.data_seed, overrides=run.overrides,
        policy=replace(run.policy, max_parallel_steps=1),
        hooks=hooks, uses_gpu=run.uses_gpu, environment=run.environment,
    )  # fmt: skip
    process = context.Process(target=_work, args=(order, theirs, printing), name=step.name)
    # A signal that came while it starts would end it before it can save.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    theirs.close()
    printing.close()
    log = run.folder / f"{step.name}.log"
    printer = threading.Thread(
        target=_print, args=(printed, log, step.name, run.say), name=f"{step.name} output", daemon=True
    )
    printer.start()
    return _Child(step=step, process=process, messages=messages, printer=printer)


def _needed(step: PlannedStep, planned: dict[str, PlannedStep]) -> dict[str, PlannedStep]:
    """Return the step and its inputs, without what is remembered of source files."""
    needed = {name: copy(planned[name]) for name in (step.name, *step.inputs.values())}
    for other in needed.values():
        other.digests = None  # what they found is kept in the step's `code`
    return needed


def _wait(children: dict[str, _Child], on_metrics: Callable[[str, Record], None]) -> list[_Child]:
    """Pass on what children report, for an instant or until one ends; return those that have ended."""
    ready = wait([child.process.sentinel for child in children.values()] + [c.messages for c in children.values()],
                 timeout=_LOOK_SECONDS)  # fmt: skip
    ended = []
    for child in children.values():
        over = child.process.sentinel in ready
        with suppress(EOFError, OSError):
            while child.messages.poll():
                message = child.messages.recv()
                if message[0] == "metrics":
                    on_metrics(*message[1:])
                else:
                    child.result = message
        if over:
            ended.append(child)
    return ended


def _take_result(child: _Child, outcome: Outcome) -> None:
    """Note what became of a child that has ended."""
    _end(child)
    step, result = child.step, child.result
    if result is None and child.asked_to_stop:
        raise Interrupted(f"{step.name} was stopped. The same command continues it.", child.asked_to_stop)
    if result is None:
        code = child.process.exitcode or 0
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        text = f"step {step.name} failed: its process ended {how} without a word. {outcome.run.folder}/{step.name}.log"
        outcome.run.event("step_failed", step=step.name, error=text)
        outcome.fail(step, StepFailed(text))
    elif result[0] == "done":
        step.verdict = Verdict(state="done")
        outcome.store.forget()
        outcome.finish(step, Path(result[1]))
    else:
        _, kind, message, code = result
        if kind == "Interrupted":
            raise Interrupted(message, code - 128)
        if kind == "StoreError":
            raise StoreError(message)
        error = getattr(errors, kind, StepFailed)(message)
        outcome.fail(step, error)


def _end(child: _Child) -> None:
    child.process.join()
    child.printer.join(_PRINTER_SECONDS)  # a program that the stage left behind may keep the pipe open
    child.messages.close()


def _print(printed: Connection, log: Path, step: str, say: Callable[[str], None]) -> None:
    """Write what a child prints to its log, and say it with the step's name, until the child has ended."""
    file: Any = None
    with suppress(OSError):
        file = log.open("a", encoding="utf-8")
    with os.fdopen(os.dup(printed.fileno()), encoding="utf-8", errors="replace") as lines:
        printed.close()
        for line in lines:
            text = redact(line.rstrip("\n"))
            if file is not None:
                with suppress(OSError):
                    file.write(text + "\n")
                    file.flush()
            say(text if text.startswith(step) else f"{step:<10} {text.strip()}")
    if file is not None:
        with suppress(OSError):
            file.close()


def _work(order: Order, messages: Connection, printing: Connection) -> None:
    """Complete one step, in the child."""
    os.setsid()
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(printing.fileno(), 1)
    os.dup2(printing.fileno(), 2)
    printing.close()
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    on_start, on_success, on_failure = order.hooks
    say = partial(print, flush=True)
    run = Run(
        folder=order.folder, config=order.config, seed=order.seed, data_seed=order.data_seed, force=[],
        overrides=order.overrides, environment=order.environment, say=say, policy=order.policy, uses_gpu=order.uses_gpu,
        hooks=Hooks(on_start=on_start, on_success=on_success, on_failure=on_failure, warn=say),
        on_metrics=lambda step, record: messages.send(("metrics", step, record)),
    )  # fmt: skip

    try:
        with stop_on_signals(run.request_stop, lambda: None):
            place = complete(order.planned[order.step], Store(order.outputs), run, order.planned)
        messages.send(("done", str(place)))
    except MlxchatError as error:
        messages.send(("failed", type(error).__name__, str(error), error.exit_code))
    except OSError as error:
        text = f"outputs folder {order.outputs} can no longer be used ({error.strerror or error}: {error.filename})"
        messages.send(("failed", "StoreError", text, 2))
    finally:
        run.hooks.finish()


def _end_with_parent() -> None:
    """Ask for an end, as a signal would, when the process that started this one is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
