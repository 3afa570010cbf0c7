"""The CPU remedy: OpenBLAS, malloc settings and compiler flags, applied before the first import of MLX.

BLAS: MLX's Linux CPU wheel links the reference BLAS (about 7 GFLOP/s in float32). It resolves the `cblas_*` symbols
when it is loaded, so an OpenBLAS loaded before it with global visibility replaces them: 30 to 50 times as fast. malloc
returns large buffers to the kernel on every release, which costs half a training step in page faults; two settings
keep them. On macOS, where MLX uses Accelerate, all of this is a no-op.

Compiler flags: `mx.compile` writes each fused kernel as C++ and calls `g++ -O3` without a target CPU, so loops use
SSE2. MLX finds `g++` by PATH, so a script of that name in front of it adds the flags, and precompiles MLX's header once
(50 MB), which takes most of a kernel's time. MLX caches kernels by name in TMPDIR, where other programs' kernels,
without flags, would be reused; ours are in the user's cache. Both variables change for this process and its children.

Products of few rows: OpenBLAS first copies both operands of a product, which takes half of a decoding step. `thin.cpp`
is compiled into the same folder and provides a `cblas_sgemm` in front of OpenBLAS's.
"""

import ctypes
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mlxchat.store.files import whole_file

# Constants of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# FMA and wide vectors; errno and floating-point traps are not used here.
_FLAGS = ["-march=native", "-fno-math-errno", "-fno-trapping-math"]
# MLX's own. A precompiled header is used only with the flags that it was compiled with.
_MLX_FLAGS = ["-std=c++17", "-O3", "-Wall", "-fPIC"]
_THIN_FLAGS = ["-std=c++20", "-O3", "-fPIC", "--param", "avoid-fma-max-bits=0", "-fschedule-insns", "-fsched-pressure"]
_HEADER = "mlx/backend/cpu/compiled_preamble.h"
_SCRIPT = Path(__file__).with_name("compiler.txt")  # a shell script in place of g++
_SCRIPT_FOLDER = "mlxchat-compiler"
_THIN = Path(__file__).with_name("thin.cpp")
_NEEDED = sys.platform == "linux"  # Linux's wheels of MLX link the reference BLAS


@dataclass(frozen=True)
class Remedy:
    """The remedy's state on this machine."""

    needed: bool  # whether MLX on this platform needs another BLAS (Linux)
    library: str | None  # the library that provides `cblas_*`; None: MLX's own
    reason: str  # readable: what was loaded, or why nothing was
    compiler: str = "as MLX does"  # readable: how element-wise kernels are compiled


_remedy: Remedy | None = None
_openblas: ctypes.CDLL | None = None
_thin: ctypes.CDLL | None = None


def remedy() -> Remedy:
    """Return the applied remedy, or before MLX's import the one that would be applied."""
    if _remedy is not None:
        return _remedy
    if "mlx.core" in sys.modules:
        return Remedy(needed=_NEEDED, library=None, reason="MLX was imported before mlxchat: import mlxchat first")
    found = _find_openblas() if _NEEDED else None
    return Remedy(needed=_NEEDED, library=str(found) if found else None, reason="not loaded yet")


def apply_remedy() -> Remedy:
    """Load an OpenBLAS, set malloc's thresholds and install the compiler flags, once; warn if there is no OpenBLAS.

    `MLXCHAT_BLAS=off` disables this; `MLXCHAT_BLAS=/path/lib.so` names the library.
    """
    global _remedy
    if _remedy is None:
        if not _NEEDED:
            _remedy = Remedy(needed=False, library=None, reason="not needed: the platform's own BLAS is fast")
        elif os.environ.get("MLXCHAT_BLAS") == "off":
            _remedy = Remedy(needed=True, library=None, reason="switched off by MLXCHAT_BLAS=off")
        else:
            _remedy = _apply()
    return _remedy


def _apply() -> Remedy:
    global _openblas, _thin
    _calm_malloc()
    compiler = install_compiler_flags()
    # MLX orders a graph breadth-first up to this width, then depth-first. With its default of 20 the lanes of a batch
    # (lanes.py) would run one after the other.
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "400")
    if core := _core_type():
        os.environ.setdefault("OPENBLAS_CORETYPE", core)
    found = _find_openblas()
    try:
        if found is None:
            raise OSError("none was found")
        _openblas = _load_openblas(found)
        _thin = _load_thin(_openblas)
        ctypes.CDLL(str(found), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        reason = f"OpenBLAS could not be loaded ({error})"
        warnings.warn(
            f"{reason}: matrix products will be about 50 times slower. "
            "Install the cpu extra (pip install 'mlxchat[cpu]') or set MLXCHAT_BLAS to a libopenblas.so.",
            stacklevel=3,
        )
        return Remedy(needed=True, library=None, reason=reason, compiler=compiler)
    reason = f"OpenBLAS, kernels {os.environ.get('OPENBLAS_CORETYPE', 'by its own choice')}"
    return Remedy(needed=True, library=str(found), reason=reason, compiler=compiler)


def set_blas_threads(count: int) -> None:
    """Set the number of cores of a matrix product; a no-op without the remedy."""
    if _openblas is not None:
        _openblas.openblas_set_num_threads(ctypes.c_int(count))
    if _thin is not None:
        ctypes.c_int.in_dll(_thin, "mlxchat_threads").value = count


def blas_threads() -> int | None:
    """Return the number of cores of a matrix product; None if our OpenBLAS is not loaded."""
    return None if _openblas is None else int(_openblas.openblas_get_num_threads())


def _find_openblas() -> Path | None:
    """Return an OpenBLAS with unprefixed `cblas_*` symbols: the user's choice, a package's, or the system's."""
    named = os.environ.get("MLXCHAT_BLAS")
    if named:
        return Path(named)
    for package, pattern in (("ngsolve_openblas", "libopenblas*.so*"), ("cmeel.prefix/lib", "libopenblas.so.0")):
        for folder in sys.path:
            for path in sorted(Path(folder, package).glob(pattern)) if folder else []:
                return path
    for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib"):
        path = Path(folder) / "libopenblas.so.0"
        if path.exists():
            return path
    return None


def _load_openblas(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        if "libgfortran" not in str(error) or not _lend_fortran_runtime():
            raise
        library = ctypes.CDLL(str(path))
    if not hasattr(library, "openblas_set_num_threads"):
        raise OSError(f"{path} is another library")
    return library


def _load_thin(blas: ctypes.CDLL) -> ctypes.CDLL | None:
    """Load `thin.cpp` globally, so that MLX finds its `cblas_sgemm` before that of `blas`; None without a compiler."""
    if not _flags_are_installed():
        return None
    library = _thin_library(Path(os.environ["TMPDIR"]))
    thin = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    behind = ctypes.cast(blas.cblas_sgemm, ctypes.c_void_p)
    ctypes.c_void_p.in_dll(thin, "mlxchat_openblas").value = behind.value
    ctypes.c_int.in_dll(thin, "mlxchat_threads").value = blas.openblas_get_num_threads()
    return thin


def _lend_fortran_runtime() -> bool:
    """Load the Fortran runtime of MLX's wheel under its plain name; return success.

    The packaged OpenBLAS needs `libgfortran.so.5`, which minimal systems lack; MLX's wheel contains it under a mangled
    name. The loader compares SONAMEs, so a copy in memory with the plain SONAME satisfies it. Nothing is written to
    disk.
    """
    plain = b"libgfortran.so.5"
    for folder in sys.path:
        libraries = Path(folder, "mlx_cpu.libs") if folder else Path()
        for runtime in libraries.glob("libgfortran-*.so*"):
            mangled = runtime.name.encode()
            image = runtime.read_bytes().replace(mangled + b"\0", plain.ljust(len(mangled) + 1, b"\0"))
            for needed in libraries.glob("libquadmath-*.so*"):
                ctypes.CDLL(str(needed), mode=ctypes.RTLD_GLOBAL)
            memory = os.memfd_create("libgfortran.so.5")
            with os.fdopen(memory, "wb") as file:
                file.write(image)
                file.flush()
                ctypes.CDLL(f"/proc/self/fd/{memory}", mode=ctypes.RTLD_GLOBAL)
            return True
    return False


def _core_type() -> str | None:
    """Return the OpenBLAS kernel family for this CPU's AVX-512 flags, which it may not detect; None: no AVX-512."""
    flags = set(_cpu_flags().split())
    if {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags:
        return "Cooperlake" if "avx512_bf16" in flags else "SkylakeX"
    return None


def _calm_malloc() -> None:
    """Keep released buffers in the process instead of returning them to the kernel (glibc only)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    # One arena, because the settings do not apply to the arena of MLX's own thread.
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def install_compiler_flags() -> str:
    """Make MLX compile kernels for this CPU; return a readable line on what was done.

    Without a compiler, or with one that rejects the flags, nothing changes.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        return "no g++: element-wise operations are not fused"
    if _flags_are_installed():  # by a parent process
        return " ".join(_FLAGS)
    try:
        folder = _folder(compiler)
        _build_thin(folder, compiler)
        script = _write_compiler(folder, compiler)
    except (OSError, subprocess.SubprocessError) as error:
        return f"as MLX does ({error})"
    tempfile.gettempdir()  # Python caches it before TMPDIR changes
    os.environ["PATH"] = f"{script.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ["TMPDIR"] = str(folder)
    return " ".join(_FLAGS)


def _flags_are_installed() -> bool:
    return Path(shutil.which("g++") or "").parent.name == _SCRIPT_FOLDER


def _thin_library(folder: Path) -> Path:
    digest = hashlib.sha256(_THIN.read_bytes()).hexdigest()[:16]
    return folder / f"thin-{digest}.so"


def _folder(compiler: str) -> Path:
    """Create and return the private folder for this compiler and this CPU: several machines may share a home folder."""
    identity = [compiler, str(Path(compiler).stat().st_mtime_ns), platform.machine(), _cpu_flags()]
    name = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "mlxchat" / "kernels" / name
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:  # no home folder, as in containers
        folder = Path(tempfile.mkdtemp(prefix="mlxchat-kernels-"))
    return folder


def _build_thin(folder: Path, compiler: str) -> None:
    # Once; this also tests that the compiler accepts the flags.
    library = _thin_library(folder)
    if library.exists():
        return
    with whole_file(library, durable=False) as unfinished:
        command = [compiler, *_FLAGS, *_THIN_FLAGS, "-shared", str(_THIN), "-o", str(unfinished)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)


def _write_compiler(folder: Path, compiler: str) -> Path:
    """Return the compiler script for this version of MLX; it is written once."""
    mlx = find_spec("mlx")
    include = Path(next(iter(mlx.submodule_search_locations or [""])) if mlx else "", "include")
    place = folder / f"headers-{importlib.metadata.version('mlx')}"
    script = place / _SCRIPT_FOLDER / "g++"
    if script.exists():
        return script
    (place / "include" / _HEADER).parent.mkdir(parents=True, exist_ok=True)
    script.parent.mkdir(exist_ok=True)
    names = {"place": place, "include": include, "compiler": compiler, "header": _HEADER}
    text = _SCRIPT.read_text(encoding="ascii").format(**names, flags=" ".join(_FLAGS), mlx_flags=" ".join(_MLX_FLAGS))
    with whole_file(script, durable=False) as unfinished:
        unfinished.write_text(text)
        unfinished.chmod(0o700)
    return script


def _cpu_flags() -> str:
    """Return the CPU's feature flags; "" where the kernel does not list them."""
    try:
        return Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0]
    except (OSError, IndexError):
        return ""
