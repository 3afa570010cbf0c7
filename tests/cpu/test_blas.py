"""The remedy for MLX's Linux CPU wheel: loaded before MLX, reported, and harmless where it fails."""

import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.cpu import runtime

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only MLX's Linux wheel needs another BLAS")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key != "MLXCHAT_BLAS"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def output_of(code: str, **environment: str) -> str:
    done = run_python(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@linux_only
def test_importing_mlx_loads_the_packaged_openblas():
    pytest.importorskip("ngsolve_openblas" if os.uname().machine == "x86_64" else "cmeel")
    code = (
        "import sys, mlxchat, mlx.core; from mlxchat.cpu.runtime import remedy; print(remedy().library); "
        "print(any('BeforeMLX' in type(f).__name__ for f in sys.meta_path))"
    )
    library, hooked = output_of(code).splitlines()
    assert "openblas" in library
    assert hooked == "False", "the hook removes itself"


@linux_only
def test_mlx_imported_first_is_reported_with_the_remedy():
    code = "import mlx.core, mlxchat; from mlxchat.cpu.runtime import remedy; print(remedy().reason)"
    assert "import mlxchat first" in output_of(code)


PRODUCT = "import mlxchat, mlx.core as mx; print(int((mx.ones((64, 64)) @ mx.ones((64, 64))).sum().item()))"


@linux_only
def test_off_keeps_mlx_own_blas():
    code = f"{PRODUCT}; from mlxchat.cpu.runtime import remedy; print(remedy().library, remedy().reason)"
    assert output_of(code, MLXCHAT_BLAS="off") == f"{64**3}\nNone switched off by MLXCHAT_BLAS=off"


@linux_only
def test_missing_library_warns_and_mlx_computes():
    done = run_python(PRODUCT, MLXCHAT_BLAS="/nowhere/libopenblas.so")
    assert done.stdout.strip() == str(64**3)
    assert "/nowhere/libopenblas.so" in done.stderr
    assert "mlxchat[cpu]" in done.stderr


@linux_only
def test_threads_of_another_library_are_not_set():
    code = f"{PRODUCT}; from mlxchat.cpu import runtime; runtime.set_blas_threads(1); print(runtime.blas_threads())"
    assert output_of(code, MLXCHAT_BLAS="libm.so.6") == f"{64**3}\nNone"


@linux_only
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("inner", "columns"), [(1, 1), (5, 13), (128, 64), (37, 131), (512, 9)])
def test_thin_products_have_the_same_bits_in_any_batch(inner, columns, transposed):
    if runtime._thin is None:
        pytest.skip("no compiler or no OpenBLAS here")
    rng = np.random.default_rng(0)
    x, b = rng.normal(size=(33, inner)).astype(np.float32), rng.normal(size=(inner, columns)).astype(np.float32)
    matrix = mx.array(b.T.copy()).T if transposed else mx.array(b)
    with runtime.thin_products():
        batches = [np.asarray(mx.array(x[:rows]) @ matrix) for rows in (33, 1, 2, 3, 4, 6, 8, 16, 32)]
    np.testing.assert_allclose(batches[0], x.astype(np.float64) @ b.astype(np.float64), atol=1e-4)
    for batch in batches:
        np.testing.assert_array_equal(batch, batches[0][: len(batch)])
