"""Runs jobs of a sweep in other processes, by Hydra's launchers and sweepers; what a job does wherever it runs.

Everything goes through `hydra.main`. Hydra's own sweeper passes job numbers (`sweep.job=1,3,4`) to the launcher, and
each process composes the job with its number. Sweepers of plugins choose overrides themselves and receive
`sweep.metric`. A job's result is a row in a file, since launchers return results in different ways.
"""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mlxchat.composition.compose import (
    CONF_MODULE,
    Composed,
    compose_config,
    explain,
    places_of_stages,
    refuse_hydras,
    register_schema,
    search_path,
)
from mlxchat.composition.overrides import as_hydra
from mlxchat.composition.sections import schema_of
from mlxchat.config.secrets import redact
from mlxchat.errors import ConfigError, Interrupted, MlxchatError, suggest
from mlxchat.runner.executors import AS_STARTED, Leave, environment, queue_signals
from mlxchat.runner.plan import PlannedStep, entries_of, plan_again
from mlxchat.runner.process import heard_signals, leave_terminal
from mlxchat.store import locks
from mlxchat.store.store import Store
from mlxchat.sweep.job import plan_to_run, run_pipeline
from mlxchat.sweep.results import Row, SweepFolder, metrics_of, settings_of

if TYPE_CHECKING:
    from omegaconf import DictConfig

POLL_SECONDS = 0.3
# On another host each poll is a request of every job to a file server.
_FAR_POLL_SECONDS = 3.0
_UNSEEN = (
    "{here} does not see the lock of the sweep, which process {pid} on {host} holds: either that process has ended, or "
    "the file system of outputs keeps locks to each host. To find out: mlxchat doctor --hosts, on both"
)
_HINTS = {
    "hydra/launcher": "Others are packages (hydra-joblib-launcher). For SLURM and Ray: executor=slurm, executor=ray",
    "hydra/sweeper": "For a search: sweep=tpe",
}
# Hydra's settings that a sweep uses; the others are refused.
_OF_SWEEPS = (
    "hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper", "hydra.sweep.dir", "hydra.searchpath",
    "hydra.job.env", "hydra/callbacks", "hydra.callbacks",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HydraSettings:
    """Hydra's settings for a sweep."""

    overrides: list[str] = field(default_factory=list)
    """`hydra.…` and `hydra/…`."""
    tasks: list[str] = field(default_factory=list)
    """Overrides that do not vary; a user's file may set Hydra's values too."""
    config_dirs: list[str] = field(default_factory=list)
    sweeper: str = "basic"
    launcher: str = "basic"
    params: list[str] = field(default_factory=list)
    """hydra.sweeper.params of the basic sweeper, as overrides."""
    folder: Path | None = None
    """hydra.sweep.dir with its resolvers resolved; None: not set."""

    @classmethod
    def read(cls, overrides: list[str], tasks: list[str], config_dirs: list[str]) -> HydraSettings:
        """Return Hydra's settings, checked before anything runs.

        Raises:
            ConfigError: no such launcher or sweeper, it is not installed, or Hydra refuses a setting.
        """
        refuse_hydras([item for item in overrides if not item.lstrip("+~").startswith(_OF_SWEEPS)])
        if not overrides and not config_dirs and not any(item.lstrip("+").startswith("experiment=") for item in tasks):
            return cls(tasks=tasks)
        from hydra.core.hydra_config import HydraConfig
        from omegaconf.errors import OmegaConfBaseException

        chosen = dict(override.lstrip("+").partition("=")[::2] for override in overrides)
        _check_plugins(chosen)
        try:
            config = _compose([*tasks, *overrides], config_dirs)
        except ConfigError:
            config = _compose(overrides, config_dirs)  # errors in the other overrides are reported later
        choices = config.hydra.runtime.choices
        sweeper = str(choices["hydra/sweeper"])
        params = (config.hydra.sweeper.get("params") or {}) if sweeper == "basic" else {}
        HydraConfig.instance().set_config(config)  # for ${hydra:…}
        try:
            folder = Path(config.hydra.sweep.dir)
        except OmegaConfBaseException as error:
            raise ConfigError(f"Hydra's settings: hydra.sweep.dir: {str(error).splitlines()[0]}") from None
        return cls(
            overrides=overrides, tasks=tasks, config_dirs=config_dirs, sweeper=sweeper,
            launcher=str(choices["hydra/launcher"]), params=[f"{key}={value}" for key, value in params.items()],
            folder=folder,
        )  # fmt: skip


def _check_plugins(chosen: Mapping[str, str]) -> None:
    """Refuse a launcher or sweeper that does not exist; list those that do."""
    groups = [group for group in _HINTS if group in chosen]
    if not groups:
        return
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_module(CONF_MODULE, version_base="1.3"):
        for group in groups:
            name, known = chosen[group], sorted(GlobalHydra.instance().config_loader().get_group_options(group))
            if name not in known:
                near = suggest(name, known)
                raise ConfigError(f'{group} has no option "{name}": {", ".join(known)}.{near} {_HINTS[group]}')


def _compose(overrides: list[str], config_dirs: list[str]) -> DictConfig:
    """Return a composed configuration with Hydra's section."""
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    overrides = [*_for_hydra(overrides, config_dirs), *search_path(config_dirs)]
    try:
        with initialize_config_module(CONF_MODULE, version_base="1.3"):
            return compose("config", overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        message = explain(error, overrides, config_dirs)
        raise ConfigError(message or f"Hydra's settings: {str(error).splitlines()[0]}") from error


def _for_hydra(overrides: list[str], config_dirs: list[str]) -> list[str]:
    """Register the schema with the stages that overrides name; return the overrides for Hydra."""
    schema = schema_of(places_of_stages(overrides, config_dirs))
    register_schema(schema)
    return as_hydra(overrides, schema)


def launch(settings: HydraSettings, folder: SweepFolder, overrides: list[str]) -> None:
    """Run jobs with Hydra's sweeper and launcher; return when all have ended or were lost.

    `overrides` are the varying ones, in addition to those of the settings.

    Raises:
        ConfigError: Hydra refuses its settings.
        Exception: the launcher has lost a process.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    place = str(folder.path.resolve()).replace("\\", "\\\\").replace("'", "\\'")
    own = [item for item in settings.overrides if not item.startswith("hydra.sweep.dir=")]
    shown = [item for item in settings.tasks if item not in hidden(settings.tasks)]
    tasks = _for_hydra(shown, settings.config_dirs)
    argv = ["-m", *tasks, *own, *search_path(settings.config_dirs)]
    app = hydra.main(version_base="1.3", config_path=f"pkg://{CONF_MODULE}", config_name="config")(run_launched)
    former = sys.argv
    sys.argv = ["mlxchat", *argv, f"hydra.sweep.dir='{place}'", *overrides]
    try:
        # Otherwise Hydra prints its own errors and exits with 1.
        with environment(AS_STARTED | {"HYDRA_FULL_ERROR": "1"}):
            app()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"Hydra's settings: {str(error).splitlines()[0]}") from None
    finally:
        sys.argv = former
        GlobalHydra.instance().clear()


def hidden(overrides: list[str]) -> list[str]:
    """Return the overrides with secrets, which Hydra must not get because it writes them to multirun.yaml."""
    return [item for item in overrides if redact(item) != item]


def _reveal(overrides: list[str]) -> list[str]:
    """Replace names of secrets in overrides of sweep.json by their values in this process's environment."""

    def secret(found: re.Match[str]) -> str:
        value = os.environ.get(found[1])
        return value if value and redact(value) == found[0] else found[0]

    return [re.sub(r"<(\w+)>", secret, item) for item in overrides]


def run_launched(config: DictConfig) -> float:
    """Run a job that Hydra's launcher started, usually in another process; return its sweep.metric, or NaN.

    Raises:
        Interrupted: the sweep stops; raised only for sweepers that choose trials themselves.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    GlobalHydra.instance().clear()  # left by hydra.main if the launcher runs jobs in this process
    hydra = HydraConfig.get()
    folder = SweepFolder(Path(hydra.sweep.dir))
    number = config.sweep.job or hydra.job.num + 1
    with queue_signals() as leave:
        row = run_elsewhere(folder, number, leave, list(hydra.overrides.task))
    stop = folder.stop()
    if stop and not config.sweep.job and row["status"] in ("interrupted", "not run"):
        raise Interrupted("the sweep was stopped. The same command continues.", stop["signal"])
    return float(row["metrics"].get(config.sweep.metric, "nan"))


@dataclass(frozen=True)
class SubmittedJob:
    """A whole job of a sweep as the call of an executor's job."""

    folder: SweepFolder
    number: int

    def __call__(self, leave: Leave | None) -> None:
        """Run the job; its row is the result."""
        run_elsewhere(self.folder, self.number, leave, is_submitted=True)


def run_elsewhere(
    folder: SweepFolder, number: int, leave: Leave | None, chosen: Sequence[str] = (), *, is_submitted: bool = False
) -> Row:
    """Run a job of a sweep, usually in another process, and return its row.

    A submitted job does not need the sweep's own process; other jobs end with it.

    Args:
        folder: the sweep's folder.
        number: number of the job.
        leave: returns the job to its queue.
        chosen: the overrides, if the sweep did not list its jobs.
        is_submitted: whether the executor submitted the whole job; its steps then run in the same process.
    """
    state = folder.state()
    planned = state["jobs"].get(str(number))
    overrides = _reveal(planned["overrides"] if planned else [*state["hidden"], *chosen])
    parent = state["parent"]
    is_here = socket.gethostname() == parent["host"]
    if not is_submitted and not is_here and not locks.is_held(folder.lock):
        row: Row = {"job": number, "overrides": settings_of(overrides), "status": "failed", "metrics": {}}
        row["error"] = _UNSEEN.format(here=socket.gethostname(), **parent)
        folder.add_row(row)
        return row
    at_home = is_here and os.getpid() == parent["pid"]

    def prepare() -> tuple[Composed, list[PlannedStep]]:
        composed = compose_config(overrides, state["config_dirs"])
        config = composed.config
        if is_submitted:
            config = replace(config, executor=replace(config.executor, kind="local"))
        store = Store(Path(config.outputs))
        plan = plan_to_run(config, store)
        if force := force_only_others(config.force, plan, set(state["made"])):
            plan = plan_again(plan, store, force=force)
        return replace(composed, config=config, overrides=overrides), plan

    with _prefixed(f"[{number}] "), _stopping_with(folder, parent, at_home=at_home, alone=is_submitted):
        if not at_home:
            os.chdir(parent["cwd"])
        return run_job(folder, number, overrides, prepare, leave)


def run_job(
    folder: SweepFolder, number: int, overrides: list[str], prepare: Callable[[], tuple[Composed, list[PlannedStep]]],
    leave: Leave | None = None,
) -> Row:  # fmt: skip
    """Run one job, write its row to the folder, and return it. A failure is a row.

    Args:
        folder: the sweep's folder.
        number: number of the job.
        overrides: overrides of the job.
        prepare: returns its configuration and plan.
        leave: called if the queue, not the sweep, stops the job, which then has no row.
    """
    row: Row = {"job": number, "overrides": settings_of(overrides), "status": "done", "metrics": {}}
    began = time.monotonic()
    if folder.stop():
        row["status"] = "not run"
        folder.add_row(row)
        return row
    fail_fast = False
    try:
        composed, plan = prepare()
        config = composed.config
        fail_fast = config.fail_fast
        row["steps"] = entries_of(plan)
        run_pipeline(composed, plan, job=f"job{number}")
        row |= {
            "steps": entries_of(plan),
            "metrics": metrics_of(plan, Store(Path(config.outputs)), config.sweep.metric),
        }  # fmt: skip
    except Interrupted as stop:
        row |= {"status": "interrupted", "error": str(stop)}
        if leave is not None and not folder.stop():
            row["error"] = f"the job was stopped and is not queued again: {leave()}"
        else:
            folder.ask_to_stop("signal", stop.exit_code - 128)
    except Exception as error:  # any failure of a job is a row of the table; the other jobs continue
        if not isinstance(error, MlxchatError):
            log = folder.path / f"job-{number}-error.log"
            log.write_text(redact(traceback.format_exc()), encoding="utf-8")
            error = MlxchatError(f"{type(error).__name__}: {error} (traceback: {log})")
        print(redact(f"error: {error}"), file=sys.stderr, flush=True)
        row |= {"status": "failed", "error": str(error).splitlines()[0]}
        if fail_fast:
            folder.ask_to_stop("fail_fast", signal.SIGTERM)
    row["seconds"] = round(time.monotonic() - began, 1)
    folder.add_row(row)
    return row


def force_only_others(force: list[str], plan: list[PlannedStep], made: set[str]) -> list[str]:
    """Return the forced steps of a plan that this sweep has not run yet."""
    return [step.name for step in plan if step.key not in made and (step.name in force or "all" in force)]


def whereabouts() -> dict[str, Any]:
    """Return pid, host and working directory of this process, for jobs in other processes."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "cwd": str(Path.cwd())}


@contextmanager
def watched(
    folder: SweepFolder, told: set[int], tell: Callable[[Row], None], *, outlived: bool = False
) -> Iterator[None]:
    """Call `tell` with each job's row that is not in `told` yet, while the body runs; a signal asks all jobs to stop.

    It is called in another thread, because launchers return only after all jobs. If the jobs outlive this process
    (`outlived`), only Ctrl-C stops them; SIGTERM and SIGHUP raise Interrupted.
    """
    ended = threading.Event()

    def look() -> None:
        for number, row in sorted(folder.rows().items()):
            if number not in told:
                told.add(number)
                tell(row)

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            look()

    def request_stop(number: int, frame: object) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        if outlived and number != signal.SIGINT:
            raise Interrupted(
                "stopped; the jobs continue: the same command awaits them, mlxchat status --cancel ends them.", number
            )
        if folder.stop():
            os._exit(128 + number)  # jobs notice that the lock is free, and end
        folder.ask_to_stop("signal", number)
        print(
            "stopping: jobs end after their current iteration, no further job starts (again: stop at once)", flush=True
        )

    previous = {number: signal.signal(number, request_stop) for number in heard_signals()}
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        look()
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Prefixed(io.TextIOBase):
    """A stream that prefixes each line and writes it in one piece, so that lines of several processes do not mix."""

    def __init__(self, stream: TextIO, prefix: str) -> None:
        self.stream, self.prefix, self.begun = stream, prefix, ""

    def write(self, text: str) -> int:
        *lines, self.begun = (self.begun + text).split("\n")
        if lines:
            self.stream.write("".join(f"{self.prefix}{line}\n" for line in lines))
            self.stream.flush()
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        """Return False: progress bars of several processes would overwrite each other."""
        return False

    def fileno(self) -> int:
        return self.stream.fileno()


@contextmanager
def _prefixed(prefix: str) -> Iterator[None]:
    out, err = _Prefixed(sys.stdout, prefix), _Prefixed(sys.stderr, prefix)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            yield
    finally:
        for stream in (out, err):
            if stream.begun:
                stream.write("\n")


@contextmanager
def _stopping_with(
    folder: SweepFolder, parent: dict[str, Any], *, at_home: bool, alone: bool = False
) -> Iterator[None]:
    """Send this process one SIGTERM when the sweep stops or its parent process no longer holds the lock.

    Ctrl-C in the terminal must reach only the parent process, since a second signal means "at once".

    Args:
        folder: the sweep's folder.
        parent: the sweep's own process.
        at_home: this is the parent process, which receives signals itself.
        alone: the job continues without the parent process.
    """
    if at_home:
        yield
        return
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":  # SLURM may identify its processes by their group
        with suppress(OSError):
            os.setpgid(0, 0)
    ended = threading.Event()
    pause = POLL_SECONDS if socket.gethostname() == parent["host"] else _FAR_POLL_SECONDS

    def watch() -> None:
        told = False
        while not ended.wait(pause):
            stop, orphaned = folder.stop(), not alone and not locks.is_held(folder.lock)
            if not told and (stop or orphaned):
                told = True
                os.kill(os.getpid(), signal.SIGTERM)
                if not stop:
                    return
            elif told and orphaned:  # a second signal has ended the parent process
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def refuse(number: int, frame: object) -> None:
        raise Interrupted("the job stopped between two steps. The same command continues the sweep from there.", number)

    former = signal.signal(signal.SIGTERM, refuse)  # a run replaces this handler by its own
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGTERM, former)
        if not alone and not locks.is_held(folder.lock):
            os._exit(1)  # nobody reads the result; idle workers would stay for minutes
