"""The CPU remedy: a fast BLAS and a calmer malloc, loaded before the first import of MLX.

MLX's Linux CPU wheel links the reference BLAS (about 7 GFLOP/s in float32). It looks the `cblas_*` names up when
it is loaded, so an OpenBLAS put into the process beforehand, with global visibility, takes their place: 30 to 50
times the speed. Large buffers, returned to the kernel on every release, cost half a training step in page faults;
two malloc settings keep them. On macOS, where Accelerate serves MLX, all of this is a no-op.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from mlxchat.ops.jit import install_compiler_flags

# Constants of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


@dataclass(frozen=True)
class Remedy:
    """What was done for MLX on this machine's CPU."""

    needed: bool
    """Whether this platform needs a BLAS from outside (Linux without a GPU build)."""
    library: str | None
    """The file that serves `cblas_*`, or None if MLX's own serves."""
    reason: str
    """One line for people: what was loaded, or why nothing was."""
    compiler: str = "as MLX does"
    """One line for people: how element-wise kernels are compiled."""


_remedy: Remedy | None = None
_openblas: ctypes.CDLL | None = None


def remedy() -> Remedy:
    """Return what was done (after MLX's import) or would be done (before it)."""
    if _remedy is not None:
        return _remedy
    if "mlx.core" in sys.modules:
        return Remedy(needed=_needed(), library=None, reason="MLX was imported before mlxchat: import mlxchat first")
    found = _find_openblas() if _needed() else None
    return Remedy(needed=_needed(), library=str(found) if found else None, reason="not loaded yet")


def apply_remedy() -> Remedy:
    """Load an OpenBLAS globally and set malloc's thresholds, once; warn when none is found.

    Returns:
        What was loaded. `MLXCHAT_BLAS=off` leaves MLX alone; `MLXCHAT_BLAS=/path/lib.so` names the library.
    """
    global _remedy, _openblas
    if _remedy is not None:
        return _remedy
    if not _needed():
        _remedy = Remedy(needed=False, library=None, reason="not needed: the platform's own BLAS is fast")
        return _remedy
    if os.environ.get("MLXCHAT_BLAS") == "off":
        _remedy = Remedy(needed=True, library=None, reason="switched off by MLXCHAT_BLAS=off")
        return _remedy
    _calm_malloc()
    compiler = install_compiler_flags()
    # MLX orders a graph by breadth up to so many branches, then by depth. At its own 20 the two halves of a batch
    # (ops/lanes.py), which run side by side, would be handed to the cores one after the other.
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "400")
    found = _find_openblas()
    if found is None:
        reason = "no OpenBLAS found"
    else:
        core = _core_type()
        if core:
            os.environ.setdefault("OPENBLAS_CORETYPE", core)
        try:
            _openblas = _load_openblas(found)
        except OSError as error:
            found, reason = None, f"OpenBLAS could not be loaded ({error})"
        else:
            reason = f"OpenBLAS, kernels {os.environ.get('OPENBLAS_CORETYPE', 'of its own choice')}"
    if found is None:
        warnings.warn(
            f"{reason}: matrix products will be about 50 times slower. "
            "Install the cpu extra (pip install 'mlxchat[cpu]') or set MLXCHAT_BLAS to a libopenblas.so.",
            stacklevel=2,
        )
    _remedy = Remedy(needed=True, library=str(found) if found else None, reason=reason, compiler=compiler)
    return _remedy


def set_blas_threads(count: int) -> None:
    """Set how many cores a matrix product uses; without the remedy this does nothing.

    Training's fat products want all cores. Decoding's thin ones are fastest on one, because idle BLAS threads
    wait by spinning.
    """
    if _openblas is not None and hasattr(_openblas, "openblas_set_num_threads"):
        _openblas.openblas_set_num_threads(ctypes.c_int(count))


def blas_threads() -> int | None:
    """Return the cores a matrix product uses, or None if our OpenBLAS is not loaded."""
    if _openblas is None or not hasattr(_openblas, "openblas_get_num_threads"):
        return None
    return int(_openblas.openblas_get_num_threads())


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_of_cores(processes: int) -> int:
    """Return how many of this machine's cores each of some processes gets that compute at the same time."""
    return max(1, available_cores() // processes)


def _needed() -> bool:
    """Tell whether MLX here is the CPU wheel for Linux."""
    return sys.platform == "linux"


def _find_openblas() -> Path | None:
    """Return an OpenBLAS that exports plain `cblas_*` names: named by the user, from a package, or the system's."""
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
    """Load the library for the whole process; where the system has no Fortran runtime, lend it the wheel's.

    Raises:
        OSError: the library, or something it needs, cannot be loaded.
    """
    try:
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        if "libgfortran" not in str(error) or not _lend_fortran_runtime():
            raise
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _lend_fortran_runtime() -> bool:
    """Load the Fortran runtime of MLX's wheel under its plain name; tell whether that worked.

    The packaged OpenBLAS asks for `libgfortran.so.5`, which a bare machine lacks, and MLX's wheel carries the same
    library under a mangled name. The loader compares the name inside the file (SONAME), so a copy in memory that
    bears the plain one satisfies it. Nothing is written to disk.
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
    """Return the OpenBLAS kernel family for this CPU's AVX-512 flags, where its own guess is too modest."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    except (OSError, IndexError):
        return None
    if {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags:
        return "Cooperlake" if "avx512_bf16" in flags else "SkylakeX"
    return None


def _calm_malloc() -> None:
    """Keep released buffers in the process instead of giving them back to the kernel (glibc only)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    # One arena, since MLX computes on a thread of its own whose arena the settings would not reach.
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
