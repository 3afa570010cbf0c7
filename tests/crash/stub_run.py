"""Run the pipeline of stubs in a process of its own: stub_run.py OUTPUTS [key=value ...].

Keys are those of the sections (source.lines=40), `fail_fast=true`, `force=[step]`, `targets=[step]`, and gpu=true,
which says that the machine has a GPU.
"""

import gc
import os
import sys
import traceback
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import yaml

from mlxchat.errors import MlxchatError
from mlxchat.runner import stage
from mlxchat.runner.leader import execute
from mlxchat.runner.plan import make_plan
from mlxchat.runner.process import Environment
from mlxchat.runner.run import Run
from mlxchat.store.files import now
from mlxchat.store.store import Store

HERE = Path(__file__).parent


def use_stubs() -> None:
    """Replace the stages by those of stubs/."""
    sys.path.insert(0, str(HERE))
    sys.dont_write_bytecode = True
    stage._PACKAGE = "stubs"
    stage._FOLDER = HERE / "stubs"


if __name__ in ("__main__", "__mp_main__"):  # not in the tests' own process; the second in children of a run
    use_stubs()

PIPELINE = {
    "source": {"stage": "source"},
    "convert": {"stage": "convert", "text": "source"},
    "train": {"stage": "train", "text": "source", "table": "convert"},
    "score": {"stage": "score", "model": "train"},
    "inspect": {"stage": "inspect", "table": "convert"},
}


@dataclass
class Source:
    lines: int = 40


@dataclass
class Convert:
    columns: int = 1


@dataclass
class Train:
    iterations: int = 4
    pause: float = field(default=0.0, metadata={"identity": False})


@dataclass
class Score:
    digits: int = 2
    seconds: float = field(default=0.0, metadata={"identity": False})
    failing: list[str] = field(default_factory=list, metadata={"identity": False})


OTHER = {"force": [], "targets": None, "gpu": False, "fail_fast": False}


@dataclass
class Settings:
    source: Source = field(default_factory=Source)
    convert: Convert = field(default_factory=Convert)
    train: Train = field(default_factory=Train)
    score: Score = field(default_factory=Score)
    machine: dict[str, Any] = field(default_factory=dict)
    pipeline: dict[str, dict[str, str]] = field(default_factory=lambda: PIPELINE)
    targets: list[str] | None = None
    force: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    seed: int = 1
    data_seed: int = 1
    code: str = "warn"


def describe_device() -> dict[str, Any]:
    return {"name": "stub"}


def has_gpu() -> bool:
    return True


def main(outputs: Path, arguments: list[str]) -> None:
    """Plan and execute; exit as the command line does."""
    settings, other = Settings(), dict(OTHER)
    for argument in arguments:
        key, _, text = argument.partition("=")
        section, _, name = key.partition(".")
        value = yaml.safe_load(text)
        if name:
            setattr(getattr(settings, section), name, value)
        else:
            assert key in other, key
            other[key] = value
    store = Store(outputs)
    settings.targets, settings.force = other["targets"], other["force"]
    plan = make_plan(settings, store)
    store.prepare()
    folder = outputs / "runs" / f"{now().replace(':', '')}-{os.getpid()}"
    folder.mkdir(parents=True)
    run = Run(
        folder=folder, seed=1, data_seed=1, overrides=arguments,
        environment=Environment(describe_device), fail_fast=other["fail_fast"],
        say=lambda line: print(line, flush=True), **({"uses_gpu": has_gpu} if other["gpu"] else {}),
    )  # fmt: skip
    execute(plan, store, run)


def end(outputs: Path, arguments: list[str]) -> int:
    """Run the pipeline; return the exit code."""
    try:
        main(outputs, arguments)
    except MlxchatError as error:
        print(f"error: {error}", flush=True)
        return error.exit_code
    return 0


def run_forked(outputs: Path, arguments: list[str], environment: dict[str, str]) -> None:
    """Run the pipeline in a fork of the tests' process, where everything is imported already, and exit."""
    code = 1
    try:
        os.closerange(3, 1 << 16)
        resource_tracker._resource_tracker._fd = None  # a pipe of the tests' process, closed by now
        gc.freeze()  # files of the tests' process must not be closed here
        gc.enable()
        os.environ.clear()
        os.environ.update(environment)
        sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115  (for the whole process)
        sys.modules["__main__"] = sys.modules[__name__]  # what children of the run import
        use_stubs()
        code = end(outputs, arguments)
    except SystemExit as exit:
        code = int(exit.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(end(Path(sys.argv[1]), sys.argv[2:]))
