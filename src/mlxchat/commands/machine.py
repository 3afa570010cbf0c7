"""This machine's setup and speed: doctor and bench."""

import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from mlxchat.commands.arguments import Parser
from mlxchat.config.wording import aligned, format_bytes
from mlxchat.errors import ConfigError, MlxchatError, StoreError, redact
from mlxchat.runner.process import versions
from mlxchat.store.catalog import check_model
from mlxchat.store.files import now, write_whole
from mlxchat.store.naming import find_model
from mlxchat.store.store import Store

_SLOW_GFLOPS = 30
_BACKENDS = ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-cuda")

Finding = tuple[str, str, str]
"""Mark (ok, note, wrong), subject, and details with the remedy."""


def doctor(parser: Parser) -> None:
    parser.add_argument("--gpu", action="store_true", help="compare a training on this device with the CPU")


def _doctor(options: Namespace) -> int:
    """Print the findings; return 1 if something is wrong."""
    if options.gpu:
        os.environ["MLXCHAT_CPU"] = "plain"  # on a CPU, check what GPUs compute
        from mlxchat.commands.device_checks import check_device

        return int(not check_device())
    findings = [*_installation(), *_device(), *_programs(), *_resources(options.outputs)]
    print(aligned(findings))
    return int(any(mark == "wrong" for mark, _, _ in findings))


def _installation() -> Iterator[Finding]:
    yield ("ok", "python", f"{platform.python_version()} ({sys.executable})")
    yield ("ok", "versions", "  ".join(f"{name} {number}" for name, number in versions().items() if name != "python"))
    names = {str(each.name).lower().replace("_", "-") for each in importlib.metadata.distributions()}
    backends = [name for name in _BACKENDS if name in names]
    if len(backends) > 1:
        yield ("wrong", "backend", f"several overwrite each other: pip uninstall {' '.join(backends)}, then make setup")
    elif sys.platform == "linux" and not backends:
        told = "MLX has no backend: pip install 'mlx[cpu]', or, for NVIDIA, make setup DEVICE=cuda13"
        yield ("wrong", "backend", told)


def _device() -> Iterator[Finding]:
    try:
        import mlx.core as mx

        from mlxchat.ops.device import describe_device, remedy
        from mlxchat.planning.forecast import measure_flops
    except ImportError as error:
        yield ("wrong", "mlx", f"cannot be imported ({error}): make setup")
        return
    device = describe_device()
    yield ("ok", "device", f"{device['name']} ({device['backend']}), {device['cores']} cores, {device['platform']}")
    done = remedy()
    if done is not None and done.needed:
        mark = "ok" if done.library else "wrong"
        yield (mark, "blas", f"{done.reason} ({done.library or 'the slow reference BLAS is in use'})")
    if device["backend"] == "cpu" and sys.platform == "linux" and shutil.which("g++") is None:
        yield ("note", "compiler", "no g++: MLX cannot compile kernels and falls back to slower ones. Install g++.")
    gflops = measure_flops(mx.float32) / 1e9
    slow = gflops < _SLOW_GFLOPS
    cause = ": far too slow. Is another program using the cores, or no fast BLAS loaded?" if slow else ""
    yield ("wrong" if slow else "ok", "speed", f"{gflops:,.0f} GFLOP/s in float32 matrix products{cause}")


def _programs() -> Iterator[Finding]:
    from mlxchat.sandbox.programs import find_confinement_problem, protections_here

    try:
        problem = find_confinement_problem()
    except MlxchatError as error:
        problem = str(error)
    if problem:
        yield ("note", "programs", f"{problem}. HumanEval cannot run here")
    else:
        yield ("ok", "programs", f"of HumanEval are confined by {', '.join(protections_here())}")


def _resources(outputs: Path) -> Iterator[Finding]:
    import psutil

    from mlxchat.store import locks

    memory = psutil.virtual_memory()
    yield ("ok", "memory", f"{format_bytes(memory.available)} free of {format_bytes(memory.total)}")
    place = outputs
    while not place.exists() and place != place.parent:
        place = place.parent
    yield ("ok", "disk", f"{format_bytes(shutil.disk_usage(place).free)} free for {outputs}")
    path = place / f".probe-{os.urandom(6).hex()}"
    try:
        with locks.hold(path, {}, lambda owner: None):
            works = locks.is_held(path)
        told = "files can be locked" if works else "two processes can hold one lock: choose another with outputs=PATH"
        yield ("ok" if works else "wrong", "outputs", f"{outputs}: {told}")
    except (OSError, StoreError) as error:
        yield ("wrong", "outputs", f"{getattr(error, 'strerror', None) or error}: choose another with outputs=PATH")
    finally:
        path.unlink(missing_ok=True)


# Kind → (module in mlxchat.bench, its function from configuration to plain data, description).
KINDS = {
    "train": ("train", "measure_training", "training steps, forward pass of validation, memory, utilisation (MFU)"),
    "generate": ("generate", "measure_generation", "prompt processing and decoding, with ID or random weights"),
}


def bench(parser: Parser) -> None:
    kinds = aligned(([kind, purpose] for kind, (_, _, purpose) in KINDS.items()), indent="  ")
    settings = "Settings: bench.KEY=VALUE, experiment=NAME (default: bench, nanochat's own sizes)"
    parser.take_names("KIND [ID]", most=2, first=KINDS, about=f"{kinds}\n{settings}")
    parser.take_settings()
    parser.description = (
        "Measure how fast this machine works, with random weights and text; bench generate also with a model, ID. "
        "What was measured is kept in outputs/bench, if there is an outputs folder. Progress goes to stderr."
    )
    parser.add_json("print one JSON object instead of tables")


def _bench(options: Namespace) -> int:
    """Measure and print tables, or one JSON object."""
    from mlxchat.composition.compose import compose_config, split_options

    kind, *names = options.names
    if kind != "generate" and names:
        raise ConfigError(f"bench {kind} takes no model: expected mlxchat bench {kind} [SETTINGS]")
    overrides, config_dirs, primary = split_options(options.settings)
    config = compose_config(_with_defaults(overrides), config_dirs, primary).config
    module, function, _ = KINDS[kind]
    measuring = import_module(f"mlxchat.bench.{module}")
    model = [find_model(Store(Path(config.outputs)), name).place for name in names]
    for place in model:
        check_model(place)
    record: dict[str, Any] = getattr(measuring, function)(config, *model)
    _keep(kind, record, [*names, *options.settings], Path(config.outputs))
    if options.json:
        print(json.dumps(record, allow_nan=False))
    else:
        measuring.print_tables(record)
    return 0


def _keep(kind: str, record: dict[str, Any], settings: list[str], outputs: Path) -> None:
    """Save the result in outputs/bench for reports, if the outputs folder exists."""
    if not outputs.is_dir():
        return
    time = now()
    kept = {"kind": kind, "time": time, "command": shlex.join(["mlxchat", "bench", kind, *settings]), "result": record}
    name = re.sub(r"[^0-9T]", "", time.partition("+")[0]).replace("T", "-")
    with suppress(OSError):
        (outputs / "bench").mkdir(exist_ok=True)
        write_whole(outputs / "bench" / f"{name}-{kind}.json", json.dumps(redact(kept)).encode())


def _with_defaults(overrides: list[str]) -> list[str]:
    """Return the overrides with experiment=bench, and with the architecture's optimizer."""
    from mlxchat.composition.compose import group_options

    given = dict(override.lstrip("+").partition("=")[::2] for override in overrides)
    if "experiment" in given:
        return overrides
    fitting = f"muon_{given.get('architecture')}"
    is_fitting = "optimizer" not in given and fitting in group_options("optimizer")
    return ["experiment=bench", *([f"optimizer={fitting}"] if is_fitting else []), *overrides]
