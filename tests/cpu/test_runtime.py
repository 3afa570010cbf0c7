"""The remedy for MLX's Linux wheel: applied before MLX is imported, reported, and harmless where it fails.

Most tests run new processes with an empty home folder.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.cpu import runtime

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="only MLX's Linux wheel needs it"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]

# A product, and a chain that fuses, so that MLX compiles a kernel.
PRODUCT = "import mlxchat, mlx.core as mx; print(int((mx.ones((64, 64)) @ mx.ones((64, 64))).sum().item())); "
REPORT = "from mlxchat.cpu.runtime import remedy; print(remedy().library, remedy().reason, remedy().compiler); "
Run = Callable[..., subprocess.CompletedProcess[str]]


def plain_path() -> str:
    """Return PATH without the folder that this process may have prepended."""
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if not folder.endswith("mlxchat-compiler"))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        for name in ("home", "tmp", "empty"):
            (tmp_path / name).mkdir(exist_ok=True)
        own = ("MLXCHAT", "XDG_", "TMP", "TEMP")
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(own)}
        settings = {"HOME": str(tmp_path / "home"), "PATH": plain_path(), "TMPDIR": str(tmp_path / "tmp")}
        return subprocess.run(
            [sys.executable, "-c", code],
            env=inherited | settings | environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )

    return run


@pytest.mark.parametrize(
    ("code", "environment", "expected"),
    [
        (PRODUCT + REPORT, {"MLXCHAT_BLAS": "off"}, "262144\nNone switched off by MLXCHAT_BLAS=off"),
        (PRODUCT, {"MLXCHAT_BLAS": "/nowhere/libopenblas.so"}, "262144"),
        ("import mlx.core; " + REPORT, {}, "import mlxchat first"),
        ("import mlxchat, mlx.core; " + REPORT, {"PATH": "/nowhere"}, "no g++"),
    ],
)
def test_what_is_switched_off_or_absent_is_reported(run, code, environment, expected):
    done = run(code, **environment)
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
