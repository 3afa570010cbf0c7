"""`mlxchat` with arguments: in a process of its own, or in this one."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kit.models import computing_on_cpu
from mlxchat.cli import main
from mlxchat.composition.compose import compose_config

Command = Callable[..., tuple[int, str]]
Say = Callable[..., str]
CommandLine = Callable[..., "subprocess.CompletedProcess[str]"]
MLXCHAT = (sys.executable, "-m", "mlxchat")


def clean_environment(**more: str) -> dict[str, str]:
    """Return this process's environment without settings of mlxchat, Hydra and Python."""
    return {
        key: value for key, value in os.environ.items() if not key.startswith(("MLXCHAT", "HYDRA", "PYTHON"))
    } | more


def run_process(
    *arguments: str | Path, cwd: Path, environ: Mapping[str, str] | None = None, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run `mlxchat` in a new process to its end."""
    return subprocess.run(
        [*MLXCHAT, *map(str, arguments)], cwd=cwd, env=clean_environment(**environ or {}), capture_output=True,
        text=True, timeout=timeout, check=False,
    )  # fmt: skip


def start_process(*arguments: str | Path, cwd: Path, stderr: int = subprocess.STDOUT) -> subprocess.Popen[str]:
    """Start `mlxchat` and return the process, which the caller waits for."""
    return subprocess.Popen(
        [*MLXCHAT, *map(str, arguments)], cwd=cwd, env=clean_environment(), stdout=subprocess.PIPE, stderr=stderr,
        text=True,
    )  # fmt: skip


def wait_until(
    condition: Callable[[], Any], process: subprocess.Popen[str] | None = None, seconds: float = 600
) -> None:
    """Return once the condition holds; fail if the process ends before."""
    until = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.01)


def processes_in(folder: Path) -> list[str]:
    """Return the processes whose working directory is in a folder, even if it was removed."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(place.joinpath("cwd").readlink()).startswith(str(folder)):
                found.append(place.name)
    return found


def saved_trainings(outputs: Path) -> set[Path]:
    """Return the work folders of the trainings that have saved a state."""
    return {path.parents[2] for path in outputs.glob("work/*/ckpt/[0-9]*/state.json")}


def run_here(*arguments: str | Path) -> int:
    """Run `mlxchat` in this process and return its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(each) for each in arguments])
    return int(ended.value.code or 0)


def run_captured(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `mlxchat` in this process; for fixtures, which have no `capsys`, and where output and errors are compared."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as errors, computing_on_cpu():
        code = run_here(*arguments)
    return subprocess.CompletedProcess([*map(str, arguments)], code, out.getvalue(), errors.getvalue())


_SHORT = """
    experiment=smoke machine=cpu machine.blas_threads=1
    model.aspect_ratio=16 model.head_width=16 model.context_tokens=256 tokenizer.vocab_size=300
    tokenizer.max_chars=20000
    pretrain.num_iterations=4 pretrain.batch.tokens=512 pretrain.eval_tokens=256 pretrain.sample_tokens=2
    midtrain.num_iterations=2 midtrain.batch.tokens=512 midtrain.eval_tokens=1024
    sft.num_iterations=2 sft.batch.tokens=512 sft.eval_tokens=1024
    rl.task.size=4 rl.evaluation.size=2 rl.num_iterations=2 rl.questions_per_iteration=2 rl.samples_per_question=2
    rl.max_new_tokens=8 rl.eval_samples=2
    eval.max_new_tokens=4
"""


@cache
def tiny_settings() -> tuple[str, ...]:
    """Return overrides that make the whole pipeline a matter of seconds."""
    config = compose_config(["experiment=smoke"]).config
    sizes = [f"suite.{name}.size=3" for name in config.suite]
    for name, stage in (("midtrain", config.midtrain), ("sft", config.sft)):
        sizes += [f"{name}.mixture.{task}.size=6" for task in stage.mixture]
        sizes += [f"{name}.validation.{task}.size=2" for task in stage.validation]
    return (*_SHORT.split(), *sizes)


@dataclass(frozen=True)
class Finished:
    """A finished run: its outputs folder, which tests must not change, and what it printed."""

    outputs: Path
    stdout: str
    stderr: str
