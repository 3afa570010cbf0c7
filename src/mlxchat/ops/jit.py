"""What `mx.compile` compiles with on a CPU: the whole vector unit of this machine instead of half of 1999's.

MLX writes each fused kernel as C++ and calls `g++ -O3` on it without naming the machine, so the loops are made for
SSE2: four numbers at a time, no fused multiply-add, and a maximum or a comparison not vectorised at all. The command
is fixed inside MLX, but it finds `g++` by PATH, so a script of that name in front of it adds the flags. MLX keeps
compiled kernels by name in TMPDIR, where unflagged ones of other programs would be taken for ours; ours get a folder
of their own in the user's cache. Both variables are changed for this process and its children; Python's own temporary
folder stays where it was.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

# FMA and wide vectors, and no attention to errno and floating-point traps, which nothing here reads.
_FLAGS = ["-march=native", "-fno-math-errno", "-fno-trapping-math"]
_PROBE = "#include <cmath>\nfloat f(float x) { return std::sqrt(x) * 2.0f + 1.0f; }\n"


def install_compiler_flags() -> str:
    """Let MLX's kernels be compiled for this machine; return one line for people on what was done.

    Without a compiler, with one that refuses the flags, or with `MLXCHAT_JIT_FLAGS=off`, nothing changes.
    """
    if os.environ.get("MLXCHAT_JIT_FLAGS") == "off":
        return "as MLX does: switched off by MLXCHAT_JIT_FLAGS=off"
    compiler = shutil.which("g++")
    if compiler is None:
        return "no g++: element-wise operations are not fused"
    if Path(compiler).parent.name == "mlxchat-compiler":  # a child process of one that did all this
        return " ".join(_FLAGS)
    try:
        folder = _folder(compiler)
        _write_compiler(folder, compiler)
    except (OSError, subprocess.SubprocessError) as error:
        return f"as MLX does ({error})"
    tempfile.gettempdir()  # found now, before TMPDIR changes
    os.environ["PATH"] = f"{folder / 'mlxchat-compiler'}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ["TMPDIR"] = str(folder)
    return " ".join(_FLAGS)


def _folder(compiler: str) -> Path:
    """Return the private folder of this compiler, these flags and this CPU, making it.

    Raises:
        OSError: neither the user's cache nor a temporary folder can be written.
    """
    identity = [compiler, str(Path(compiler).stat().st_mtime_ns), *_FLAGS, platform.machine(), _cpu_flags()]
    name = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        folder = cache / "mlxchat" / "kernels" / name
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(folder, os.W_OK):
            raise PermissionError(folder)
    except (OSError, RuntimeError):
        folder = Path(tempfile.mkdtemp(prefix="mlxchat-kernels-"))
    return folder


def _write_compiler(folder: Path, compiler: str) -> None:
    """Write the script and try it once, so that flags which this compiler does not know are found here."""
    script = folder / "mlxchat-compiler" / "g++"
    if script.exists():
        return
    probe, library = folder / f"probe-{os.getpid()}.cpp", folder / f"probe-{os.getpid()}.so"
    probe.write_text(_PROBE)
    try:
        command = [compiler, *_FLAGS, "-O3", "-fPIC", "-shared", str(probe), "-o", str(library)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    finally:
        probe.unlink(missing_ok=True)
        library.unlink(missing_ok=True)
    script.parent.mkdir(exist_ok=True)
    temporary = script.with_name(f"g++-{os.getpid()}")
    temporary.write_text(f'#!/bin/sh\nexec "{compiler}" {" ".join(_FLAGS)} "$@"\n')
    temporary.chmod(0o700)
    temporary.rename(script)


def _cpu_flags() -> str:
    """Return what the CPU can do, since one home folder may serve several machines."""
    try:
        return Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0]
    except (OSError, IndexError):
        return ""
