"""Kernels compiled for this CPU: the compiler gets the flags, kernels get a private folder, nothing else changes.

Each test runs new processes with an empty home folder.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlxchat.cpu import runtime as jit

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="only MLX's Linux wheel compiles with g++"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]

# A chain that fuses, so that MLX compiles a kernel; its value is known.
KERNEL = "import mlxchat, mlx.core as mx; print(mx.compile(lambda x: (x * 2 + 1) * x)(mx.array([3.0])).item()); "
START = "import mlxchat, mlx.core; "
REMEDY = "from mlxchat.cpu.runtime import remedy; print(remedy().compiler); "

Run = Callable[..., list[str]]


def plain_path() -> str:
    """Return PATH without the folder that this process may have prepended."""
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if not folder.endswith("mlxchat-compiler"))


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(code: str, **environment: str) -> list[str]:
        (tmp_path / "home").mkdir(exist_ok=True)
        (tmp_path / "tmp").mkdir(exist_ok=True)
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith(("MLXCHAT", "XDG_", "TMP", "TEMP"))
        }
        settings = {"HOME": str(tmp_path / "home"), "PATH": plain_path(), "TMPDIR": str(tmp_path / "tmp")}
        done = subprocess.run(
            [sys.executable, "-c", code], env=inherited | settings | environment,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def kernels_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.so") if not path.name.startswith("thin-")]


@pytest.mark.slow
def test_kernels_are_in_the_users_cache_with_a_precompiled_header(run, tmp_path):
    assert run(KERNEL + REMEDY) == ["21.0", " ".join(jit._FLAGS)]
    folder = tmp_path / "home" / ".cache" / "mlxchat" / "kernels"
    (private,) = folder.iterdir()
    assert private.stat().st_mode & 0o077 == 0, "others must not be able to write code there"
    assert kernels_below(private)
    assert not kernels_below(tmp_path / "tmp")
    assert [path.suffix for path in private.glob("thin-*")] == [".so"]
    # A precompiled header gives the same machine code.
    (header,), (script,) = private.rglob("*.gch"), private.rglob("g++")
    source = next(private.rglob("*.cpp"))
    include = Path(mx.__file__).parent / "include"
    texts = []
    for compiler in ([str(script)], [str(shutil.which("g++", path=plain_path())), *jit._FLAGS]):
        command = [*compiler, *jit._MLX_FLAGS, "-w", "-S", "-H", f"-I{include}", str(source), "-o", "-"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        texts.append(done.stdout)
        assert (f"! {header}" in done.stderr) is (compiler[0] == str(script))
    assert texts[0] == texts[1]


def test_kernels_are_compiled_once_with_the_flags(run, tmp_path):
    """By a compiler that logs its arguments. A second process compiles nothing."""
    log, real = tmp_path / "calls", shutil.which("g++", path=plain_path())
    write_script(tmp_path / "bin" / "g++", f'echo "$@" >> "{log}"; exec "{real}" "$@"')
    path = f"{tmp_path / 'bin'}{os.pathsep}{plain_path()}"
    assert run(KERNEL, PATH=path) == ["21.0"]
    calls = log.read_text().splitlines()
    assert calls
    assert all(line.split()[: len(jit._FLAGS)] == jit._FLAGS for line in calls)
    assert run(KERNEL, PATH=path) == ["21.0"]
    assert [call for call in log.read_text().splitlines()[len(calls) :] if "--version" not in call] == []
    (private,) = (tmp_path / "home" / ".cache" / "mlxchat" / "kernels").iterdir()
    assert private.stat().st_mode & 0o077 == 0, "others must not be able to write code there"
    assert kernels_below(private)
    assert not kernels_below(tmp_path / "tmp")


def test_child_process_adds_no_second_wrapper(run):
    code = (
        "import mlxchat, mlx.core, os, subprocess, sys; "
        'code = \'import mlxchat, mlx.core, os; print(os.environ["PATH"], os.environ["TMPDIR"])\'; '
        "print(os.environ['PATH'], os.environ['TMPDIR']); sys.stdout.flush(); "
        "subprocess.run([sys.executable, '-c', code], check=True)"
    )
    parent, child = run(code)
    assert parent == child
    assert parent.count("mlxchat-compiler") == 1


def test_off_leaves_the_environment_alone(run, tmp_path):
    code = "import os; before = dict(os.environ); import mlxchat, mlx.core; " + (
        "print([before[key] == os.environ[key] for key in ('PATH', 'TMPDIR')]); "
    )
    *lines, compiler = run(code + KERNEL + REMEDY, MLXCHAT_JIT_FLAGS="off")
    assert lines == ["[True, True]", "21.0"]
    assert compiler == "as MLX does: switched off by MLXCHAT_JIT_FLAGS=off"
    assert not (tmp_path / "home" / ".cache").exists()


def test_missing_compiler_is_reported(run, tmp_path):
    (tmp_path / "empty").mkdir()
    code = (
        "import os; before = dict(os.environ); from mlxchat.cpu.runtime import install_compiler_flags; "
        "print(install_compiler_flags()); print(os.environ['PATH'] == before['PATH'])"
    )
    assert run(code, PATH=str(tmp_path / "empty")) == ["no g++: element-wise operations are not fused", "True"]


def test_compiler_that_rejects_the_flags_gets_none(run, tmp_path):
    real = shutil.which("g++", path=plain_path())
    write_script(tmp_path / "bin" / "g++", f'case "$*" in *-march=native*) exit 1;; esac; exec "{real}" "$@"')
    path = f"{tmp_path / 'bin'}{os.pathsep}{plain_path()}"
    result, compiler = run(KERNEL + REMEDY, PATH=path)
    assert result == "21.0"
    assert compiler.startswith("as MLX does")
    assert run("import mlxchat, mlx.core, os; print(os.environ['PATH'])", PATH=path) == [path]


def test_unwritable_cache_gives_a_temporary_folder(run, tmp_path):
    assert run(START + REMEDY, XDG_CACHE_HOME="/dev/null") == [" ".join(jit._FLAGS)]
    (folder,) = (tmp_path / "tmp").glob("mlxchat-kernels-*")
    assert folder.stat().st_mode & 0o077 == 0


def test_temporary_folder_of_python_is_unchanged(run, tmp_path):
    code = "import mlxchat, mlx.core, os, tempfile; print(tempfile.gettempdir()); print(os.environ['TMPDIR'])"
    python, mlx = run(code)
    assert python == str(tmp_path / "tmp")
    assert mlx != python


def test_another_compiler_gets_another_folder(run, tmp_path):
    """Kernels of one compiler are not reused for another; the cache follows XDG_CACHE_HOME."""
    real = shutil.which("g++", path=plain_path())
    for name in ("one", "other"):
        write_script(tmp_path / name / "g++", f'exec "{real}" "$@"')
        run(START, PATH=f"{tmp_path / name}{os.pathsep}{plain_path()}", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache" / "mlxchat" / "kernels").iterdir())) == 2
    assert not (tmp_path / "home" / ".cache").exists()
