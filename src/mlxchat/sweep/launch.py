"""Hydra's launchers: jobs in other processes. Which one is checked by name before anything runs."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxchat.errors import ConfigError, suggest
from mlxchat.sweep.folder import Row, SweepFolder
from mlxchat.sweep.slurm import all_waited_for

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from omegaconf import DictConfig

# Launcher → the extra that brings it.
EXTRAS = {
    "joblib": "joblib",
    "submitit_local": "submitit",
    "submitit_slurm": "submitit",
    "slurm": "submitit",  # conf/hydra/launcher/slurm.yaml
    "ray": "ray",
    "ray_aws": "ray",
}
_POLL_SECONDS = 0.2


def launcher_of(hydras: list[str]) -> str:
    """Return the name of the launcher that Hydra's overrides choose: `basic` runs the jobs in this process.

    Args:
        hydras: the overrides that are Hydra's own.

    Raises:
        ConfigError: no such launcher, or what brings it is not installed; or another sweeper than the basic one.
    """
    chosen = "basic"
    for override in hydras:
        key, _, value = override.lstrip("+").partition("=")
        if key == "hydra/sweeper" and value != "basic":
            raise ConfigError(
                f"{override}: -m lists its jobs beforehand, as Hydra's basic sweeper does. For a search: sweep=tpe"
            )
        if key == "hydra/launcher":
            chosen = value
    if chosen not in ("basic", *EXTRAS):
        known = ("basic", *EXTRAS)
        raise ConfigError(f'hydra/launcher has no option "{chosen}": {", ".join(known)}.{suggest(chosen, known)}')
    if chosen != "basic" and not _is_installed(f"hydra_plugins.hydra_{EXTRAS[chosen]}_launcher"):
        raise ConfigError(
            f"hydra/launcher={chosen} is not installed: pip install 'mlxchat[{EXTRAS[chosen]}]' "
            f"(or hydra-{EXTRAS[chosen]}-launcher)"
        )
    return chosen


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that all plugins are in
        return False


def check_settings(hydras: list[str], config_dirs: list[str], tasks: list[str]) -> list[str]:
    """Refuse settings of Hydra's that it does not have, before anything is computed.

    Returns:
        what `hydra.sweeper.params` varies, as overrides: a file of the user's may say it.

    Raises:
        ConfigError: what Hydra says about the first of them.
    """
    from hydra.core.global_hydra import GlobalHydra

    try:
        _compose(hydras, config_dirs)
        with suppress(ConfigError):  # a mistake in the others is told later, in our words
            config = _compose([*hydras, *tasks], config_dirs)[1]
            return [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
        return []
    finally:
        GlobalHydra.instance().clear()


def resolve_folder(override: str, config_dirs: list[str], tasks: list[str]) -> Path:
    """Return the folder that `hydra.sweep.dir=…` names, its resolvers and references resolved.

    Raises:
        ConfigError: it cannot be resolved.
    """
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf.errors import OmegaConfBaseException

    try:
        return Path(_compose([override, *tasks], config_dirs)[1].hydra.sweep.dir)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{override}: {str(error).splitlines()[0]}") from None
    finally:
        GlobalHydra.instance().clear()


def _compose(hydras: list[str], config_dirs: list[str]) -> tuple[Hydra, DictConfig]:
    """Return Hydra, set up for a sweep, and the configuration that its launcher is made from."""
    from hydra._internal.hydra import Hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    from mlxchat.compose import register_schema
    from mlxchat.sweep.expand import search_path

    register_schema()
    GlobalHydra.instance().clear()
    try:
        hydra = Hydra.create_main_hydra2("mlxchat", search_path())
        folders = [f"hydra.searchpath=[{','.join(f'file://{path}' for path in config_dirs)}]"] if config_dirs else []
        hydras = [*hydras, *folders]
        return hydra, hydra.compose_config("config", hydras, run_mode=RunMode.MULTIRUN, with_log_configuration=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"Hydra's settings: {str(error).splitlines()[0]}") from None


def launch(
    jobs: Sequence[Sequence[str]],
    hydras: list[str],
    config_dirs: list[str],
    folder: SweepFolder,
    task: Callable[..., None],
) -> None:
    """Run jobs by the launcher of Hydra's overrides, and return when all have ended or were given up.

    Args:
        jobs: overrides of each; the task finds the job's place in this list as `hydra.job.num`.
        hydras: Hydra's own overrides.
        config_dirs: folders with further YAML files.
        folder: the sweep's folder.
        task: called in the job's process with its configuration.

    Raises:
        ConfigError: Hydra refuses the settings of the launcher.
        Exception: whatever the launcher raises if it loses a process.
    """
    from hydra._internal.callbacks import Callbacks
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext

    place = str(folder.path.resolve()).replace("\\", "\\\\").replace("'", "\\'")
    try:
        hydra, config = _compose([*hydras, f"hydra.sweep.dir='{place}'"], config_dirs)
        callbacks = Callbacks(config)
        launcher = Plugins.instance().instantiate_launcher(
            HydraContext(config_loader=hydra.config_loader, callbacks=callbacks), task, config
        )
        size = config.hydra.sweeper.get("max_batch_size") or len(jobs)
        callbacks.on_multirun_start(config=config, config_name="config")
        with all_waited_for(folder) if "submitit" in type(launcher).__module__ else nullcontext():
            for start in range(0, len(jobs), size):
                launcher.launch(jobs[start : start + size], initial_job_idx=start)
        callbacks.on_multirun_end(config=config, config_name="config")
    finally:
        GlobalHydra.instance().clear()


@contextmanager
def told_as_they_end(folder: SweepFolder, known: set[int], tell: Callable[[Row], None]) -> Iterator[None]:
    """Tell of each job's result when it is there, while the body runs: launchers return only when all have ended.

    Args:
        folder: the sweep's folder.
        known: jobs whose rows were told of before.
        tell: called with each new row, in another thread.
    """
    ended = threading.Event()

    def look() -> None:
        for number, row in sorted(folder.rows().items()):
            if number not in known:
                known.add(number)
                tell(row)

    def watch() -> None:
        while not ended.wait(_POLL_SECONDS):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        look()


@contextmanager
def environment(variables: dict[str, str | None]) -> Iterator[None]:
    """Give environment variables other values while the body runs; None takes one away."""
    former = {name: os.environ.get(name) for name in variables}

    def put(values: dict[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(variables)
    try:
        yield
    finally:
        put(former)


@contextmanager
def stopped_by_signals(folder: SweepFolder) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into a word to all jobs, wherever they run; the second leaves at once."""

    def request_stop(number: int, frame: object) -> None:
        if folder.stop():
            os._exit(128 + number)  # the jobs see that nobody waits for them
        folder.ask_to_stop("signal", number)
        print(
            "stopping: jobs end at their next iteration border, no further one starts (again: stop at once)", flush=True
        )

    previous = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def whereabouts() -> dict[str, Any]:
    """Return where this process is, for jobs that run elsewhere."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "cwd": str(Path.cwd())}
