"""Optimisations of MLX for Linux CPUs; Macs and NVIDIA GPUs do not use them.

- `runtime`: OpenBLAS, malloc settings and compiler flags, applied before MLX's first import;
- `lanes`: a stream for each core, and the training step on them;
- `kernels`: operations in few passes over memory, with memory-saving gradients;
- `thin.cpp`: matrix products of few rows, for decoding, on all cores.

The code for GPUs does not know this package: `install` adds an import hook, which gives each function of REPLACED its
version for CPUs when its module is imported. Without this folder everything works, slower. `MLXCHAT_CPU=plain` runs the
code for GPUs on a CPU.
"""

import os
import sys
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _same_names(module: str, *names: str) -> dict[str, str]:
    return {name: f"{module}.{name}" for name in names}


REPLACED: dict[str, dict[str, str]] = {
    "mlxchat.bench.generate": _same_names("lanes", "sum_arrays"),
    "mlxchat.engine.decode": _same_names("lanes", "extend_caches"),
    "mlxchat.engine.sample": _same_names("kernels", "most_likely", "likeliest", "draw_places"),
    "mlxchat.model.gpt": _same_names(
        "kernels", "linear", "rms_norm", "rotate_and_normalise", "window_mask", "attention", "squared_relu", "soft_cap"
    ),
    "mlxchat.model.lora": _same_names("kernels", "frozen_linear"),
    "mlxchat.model.scoring": _same_names("lanes", "score_batch"),
    "mlxchat.ops.loss": _same_names("kernels", "capped_logits", "token_scores", "cross_entropy_sum"),
    "mlxchat.optim.muon": {
        **_same_names("kernels", "apply_quintics"),
        **_same_names("lanes", "muon_update", "normuon_update"),
    },
    "mlxchat.training.step": {
        "TrainStep.__call__": "lanes.apply_batch",
        "Backward.sum_gradients": "lanes.sum_gradients",
        "Backward.add_micro_batch": "lanes.add_micro_batch",
    },
}
"""Module → its functions → their versions for CPUs. The original is `__wrapped__` of its replacement."""


class Hook:
    """Import hook: applies the remedy before MLX is imported, and replaces functions after their import."""

    met_mlx = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the spec of a module of REPLACED, as the next finders find it."""
        if fullname == "mlx" and not self.met_mlx:
            self.met_mlx = True
            from mlxchat.cpu.runtime import apply_remedy

            apply_remedy()
        if fullname not in REPLACED:
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((each for each in found if each is not None), None)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_replace(module: ModuleType) -> None:
            execute(module)
            for name, version in REPLACED[fullname].items():
                owner, _, last = name.rpartition(".")
                place = getattr(module, owner) if owner else module
                setattr(place, last, _choosing(getattr(place, last), version))

        spec.loader.exec_module = execute_and_replace  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Install the import hook, once."""
    if not any(isinstance(finder, Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, Hook())


def plain_version(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what the version of a function for CPUs replaces, or the function itself."""
    found: Callable[..., Any] = getattr(function, "__wrapped__", function)
    return found


def _choosing(plain: Callable[..., Any], version: str) -> Callable[..., Any]:
    """Return a function that calls its version for CPUs if the default device is one, else `plain`."""

    @wraps(plain)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (_version(version) if _is_in_use() else plain)(*args, **kwargs)

    return chosen


def _is_in_use() -> bool:
    import mlx.core as mx  # after the remedy

    return mx.default_device().type == mx.DeviceType.cpu and os.environ.get("MLXCHAT_CPU") != "plain"


@cache
def _version(name: str) -> Callable[..., Any]:
    module, _, function = name.rpartition(".")
    found: Callable[..., Any] = getattr(import_module(f"mlxchat.cpu.{module}"), function)
    return found
