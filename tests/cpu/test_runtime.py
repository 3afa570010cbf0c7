"""The remedy for MLX's Linux wheel: applied before MLX is imported, reported, and harmless where it fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxchat
from kit.commands import clean_environment, tiny_settings
from mlxchat.cpu import runtime
from mlxchat.cpu.lanes import Lanes

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="only MLX's Linux wheel needs it"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]

# A product, and a chain that fuses, so that MLX compiles a kernel.
PRODUCT = "import mlxchat, mlx.core as mx; print(int((mx.ones((64, 64)) @ mx.ones((64, 64))).sum().item())); "
REPORT = "from mlxchat.cpu.runtime import remedy; print(remedy().library, remedy().reason, remedy().compiler); "


@pytest.mark.parametrize(
    ("code", "environment", "expected"),
    [
        (PRODUCT + REPORT, {"MLXCHAT_BLAS": "off"}, "262144\nNone switched off by MLXCHAT_BLAS=off"),
        (PRODUCT, {"MLXCHAT_BLAS": "/nowhere/libopenblas.so"}, "262144"),
        ("import mlxchat, mlx.core; " + REPORT, {"PATH": "/nowhere"}, "no g++"),
    ],
)
def test_what_is_switched_off_or_absent_is_reported(tmp_path, code, environment, expected):
    inherited = clean_environment(HOME=str(tmp_path), TMPDIR=str(tmp_path), **environment)
    done = subprocess.run([sys.executable, "-c", code], env=inherited, capture_output=True, text=True, check=True)
    assert expected in done.stdout
    assert ("mlxchat[cpu]" in done.stderr) is ("nowhere" in environment.get("MLXCHAT_BLAS", ""))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("inner", "columns"), [(1, 1), (5, 13), (128, 64), (37, 131), (512, 9), (512, 1031)])
def test_thin_products(inner, columns, transposed):
    """Against NumPy in float64, also of matrices that several threads share; repeated, since threads race."""
    if runtime._thin is None:
        pytest.skip("no OpenBLAS here")
    rng = np.random.default_rng(0)
    x, b = rng.normal(size=(64, inner)).astype(np.float32), rng.normal(size=(inner, columns)).astype(np.float32)
    matrix = mx.array(b.T.copy()).T if transposed else mx.array(b)
    runtime.set_blas_threads(3)  # the fixture same_cores restores them
    for rows in (1, 2, 3, 4, 6, 33, 64) * 20:
        product = np.asarray(mx.array(x[:rows]) @ matrix)
        np.testing.assert_allclose(product, x[:rows].astype(np.float64) @ b.astype(np.float64), atol=1e-3)


# Lanes share BLAS threads, which are restored


def lanes_of(count: int) -> Lanes:
    """Return this number of lanes on any machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "blas_threads", lambda: count)
        return Lanes()


def test_products_have_one_thread_while_several_lanes_compute():
    before = runtime.blas_threads()
    if before is None:
        pytest.skip("no OpenBLAS here")
    with lanes_of(2).sharing(1):
        assert runtime.blas_threads() == before
    with lanes_of(2).sharing(2):
        assert runtime.blas_threads() == 1
    assert runtime.blas_threads() == before


# The package without `mlxchat/cpu`: the plain path of Metal and CUDA in bfloat16, on this machine's CPU

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
