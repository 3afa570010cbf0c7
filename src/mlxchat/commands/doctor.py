"""mlxchat doctor: what this machine has, what is wrong, and how to mend it."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from mlxchat import __version__
from mlxchat.commands.arguments import make_parser, outputs_folder
from mlxchat.config.wording import format_bytes
from mlxchat.errors import MlxchatError
from mlxchat.store.environment import versions

_SLOW_GFLOPS = 30
_LITTLE_DISK_BYTES = 5e9

Finding = tuple[str, str, str]
"""Mark (ok, note, wrong), what, and details with the remedy."""


def main(arguments: list[str]) -> int:
    """Print the findings; return 1 if something is wrong."""
    parser = make_parser("doctor", "Check this machine and installation, and the file system of the outputs folder.")
    parser.add_argument("--hosts", action="store_true", help="try locks between two machines: run it on both at once")
    parser.add_argument("--seconds", type=float, default=120, help="how long to wait for the other one (default: 120)")
    options = parser.parse_intermixed_args(arguments)
    outputs = outputs_folder(options.settings)
    if options.hosts:
        findings = [*_folder(outputs), *_hosts(outputs, options.seconds)]
    else:
        findings = [*_installation(), *_device(), *_programs(), *_resources(outputs), *_folder(outputs)]
    for mark, what, details in findings:
        print(f"{mark:<5} {what:<10} {details}")
    return int(any(mark == "wrong" for mark, _, _ in findings))


def _installation() -> Iterator[Finding]:
    good = (3, 11) <= sys.version_info[:2] < (3, 14)
    remedy = "" if good else ": mlxchat needs Python 3.11 to 3.13"
    yield ("ok" if good else "wrong", "python", f"{platform.python_version()} ({sys.executable}){remedy}")
    found = versions()
    yield ("ok", "versions", "  ".join(f"{name} {number}" for name, number in found.items() if name != "python"))
    if "mlxchat" in found and found["mlxchat"] != __version__:
        yield ("wrong", "versions", f"mlxchat is {__version__} but installed as {found['mlxchat']}: make setup")
    backends = [name for name in ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-cuda") if _version(name)]
    if len(backends) > 1:
        yield (
            "wrong",
            "backend",
            f"{' and '.join(backends)} are installed together and overwrite each other's library: "
            f"pip uninstall {' '.join(backends)}, then make setup (DEVICE=cuda13 for NVIDIA)",
        )
    elif sys.platform == "linux" and not backends:
        yield ("wrong", "backend", "MLX has no backend: pip install 'mlx[cpu]', or make setup DEVICE=cuda13")


def _device() -> Iterator[Finding]:
    try:
        import mlx.core as mx

        from mlxchat.ops.device import describe_device, remedy
    except ImportError as error:
        yield ("wrong", "mlx", f"cannot be imported ({error}): make setup")
        return
    device = describe_device()
    yield ("ok", "device", f"{device['name']} ({device['backend']}), {device['cores']} cores, {device['platform']}")
    done = remedy()
    if done is not None and done.needed:
        mark = "ok" if done.library else "wrong"
        yield (mark, "blas", f"{done.reason} ({done.library or 'the reference BLAS serves: slow'})")
        yield ("ok", "kernels", f"compiled with g++ {done.compiler}")
    if device["backend"] == "cpu" and sys.platform == "linux" and shutil.which("g++") is None:
        yield ("note", "compiler", "no g++: MLX cannot compile kernels and falls back to slower ones. Install g++.")
    available = [name for name in ("ring", "jaccl", "nccl", "mpi") if mx.distributed.is_available(name)]
    missing = [name for name in ("ring", "jaccl", "nccl", "mpi") if name not in available]
    lacking = f" ({', '.join(missing)}: not here)" if missing else ""
    mark = "ok" if available else "note"
    yield (mark, "ranks", f"can compute together by {', '.join(available) or 'nothing'}{lacking}")
    matrix = mx.random.normal((1024, 1024))
    mx.eval(matrix @ matrix)
    seconds = []
    for _ in range(7):
        began = time.perf_counter()
        mx.eval(matrix @ matrix)
        seconds.append(time.perf_counter() - began)
    gflops = 2 * 1024**3 / min(seconds) / 1e9
    slow = gflops < _SLOW_GFLOPS
    remedy_text = ": far too slow. Is another program using the cores, or no fast BLAS loaded?" if slow else ""
    yield ("wrong" if slow else "ok", "speed", f"{gflops:,.0f} GFLOP/s in float32 matrix products{remedy_text}")


def _programs() -> Iterator[Finding]:
    from mlxchat.sandbox.programs import protections_here

    try:
        found = protections_here()
    except MlxchatError as error:
        yield ("note", "programs", f"{error}. HumanEval cannot be evaluated here")
        return
    confined = bool({"seccomp", "sandbox-exec"} & set(found))
    remedy = "" if confined else ": other processes of a program are looked for and killed, but not forbidden"
    yield ("ok" if confined else "note", "programs", f"of HumanEval run under {', '.join(found)}{remedy}")


def _resources(outputs: Path) -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    yield ("ok", "memory", f"{format_bytes(memory.available)} free of {format_bytes(memory.total)}")
    place = outputs if outputs.exists() else Path()
    disk = shutil.disk_usage(place)
    little = disk.free < _LITTLE_DISK_BYTES
    remedy = ": little. Free some, or choose another place with outputs=PATH" if little else ""
    yield ("note" if little else "ok", "disk", f"{format_bytes(disk.free)} free for {outputs}{remedy}")


def _folder(outputs: Path) -> Iterator[Finding]:
    from mlxchat.store.mounts import mount_of
    from mlxchat.store.probing import probe_folder

    place = outputs
    while not place.exists() and place != place.parent:
        place = place.parent
    mount = mount_of(place)
    reason = mount.hides_locks()
    if reason is not None:
        yield ("note", "sharing", f"{outputs} is for one host: {reason}. To try it: mlxchat doctor --hosts, on both")
    elif not mount.is_local:
        yield ("ok", "sharing", f"{outputs} is {mount.kind}: hosts that mount it so see each other's locks")
    try:
        found = list(probe_folder(place))
    except OSError as error:
        yield ("wrong", "outputs", f"{outputs} cannot be written ({error.strerror}): choose another with outputs=PATH")
        return
    if all(mark == "ok" for mark, _ in found):
        yield ("ok", "outputs", f"{mount.kind}: locks, renames, links and times of files work in {outputs}")
    for mark, text in found:
        if mark != "ok":
            yield (mark, "outputs", f"{text} ({place}, {mount.kind})")


def _hosts(outputs: Path, seconds: float) -> Iterator[Finding]:
    from mlxchat.store.probing import HostsProbe

    probe = HostsProbe(outputs / "locks", seconds, say=lambda line: print(line, flush=True))
    try:
        for mark, text in probe.run():
            yield (mark, "hosts", text.removeprefix("hosts: "))
    except OSError as error:
        yield ("wrong", "hosts", f"{outputs}: {error.strerror or error}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
