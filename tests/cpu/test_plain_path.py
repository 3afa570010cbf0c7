"""The package without `mlxchat/cpu`: the plain path of Metal and CUDA in bfloat16, on this machine's CPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mlxchat
from kit.commands import tiny_settings

PACKAGE = Path(mlxchat.__file__).parent


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(PACKAGE, folder / "mlxchat", ignore=shutil.ignore_patterns("cpu", "__pycache__"))
    for name in ("conf", "stages"):
        if not (folder / "mlxchat" / name).exists():
            shutil.copytree(PACKAGE.parents[1] / name, folder / "mlxchat" / name)
    return folder


# Remove the finder of an editable installation, which would take precedence.
START = """
import runpy, sys
sys.path[:0] = sys.argv.pop(1).split(":")
sys.meta_path[:] = [each for each in sys.meta_path if "editable" not in str(each).lower()]
"""


def run(copy: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MLXCHAT")}
    return subprocess.run(
        [sys.executable, "-c", START + arguments[0], f"{copy}:{Path(__file__).parent}", *arguments[1:]],
        cwd=cwd, env=environ, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_pipeline_runs_without_cpu_package(copy, tmp_path):
    done = run(copy, "runpy.run_module('mlxchat')", *tiny_settings(), "machine.compute_dtype=bfloat16", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
