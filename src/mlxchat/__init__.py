"""mlxchat: nanochat's pipeline on Apple MLX, as a declarative, cached, versioned DAG.

From Python: `compose(*overrides)` returns a pipeline with `plan()` and `run()`; `open(name)` an artifact.
"""

from contextlib import suppress
from importlib import import_module
from typing import Any

__version__ = "0.3.0"

# MLX's wheel for Linux CPUs needs a fast BLAS, which has to be loaded before it, and other kernels.
with suppress(ModuleNotFoundError):
    from mlxchat.cpu import install

    install()

_API = {"compose": "mlxchat.pipeline:compose", "open": "mlxchat.artifact:open_artifact"}


def __getattr__(name: str) -> Any:
    """Return a function of the Python API, whose modules take a moment to import."""
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, function = _API[name].partition(":")
    return getattr(import_module(module), function)
