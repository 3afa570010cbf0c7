"""A user's Python function named module:function: found in the folder where mlxchat was started, or installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlxchat.errors import ConfigError


def function_file(name: str) -> Path:
    """Return the file of the module in `module:function`, which is not imported for it (packages above it are).

    Raises:
        ConfigError: there is no such module, or the name has another form.
    """
    module = _split(name)[0]
    with _here_on_path():
        try:
            spec = importlib.util.find_spec(module)
        except Exception as error:  # a package above it is the user's code
            raise ConfigError(f"{name}: {module} cannot be imported ({type(error).__name__}: {error})") from None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ConfigError(
            f"{name}: there is no module {module}, neither in {Path.cwd()} nor installed. Expected module:function, "
            "such as rewards:brevity for the function brevity in rewards.py"
        )
    return Path(spec.origin)


def load_function(name: str) -> Callable[..., Any]:
    """Import and return the function that `module:function` names.

    Raises:
        ConfigError: it cannot be imported, is not there, or cannot be called.
    """
    module, attribute = _split(name)
    function_file(name)
    with _here_on_path():
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except Exception as error:  # the user's code may raise anything
            raise ConfigError(f"{name}: importing {module} failed ({type(error).__name__}: {error})") from None
    if not callable(found):
        what = "has no function" if found is None else "has something that is no function, named"
        raise ConfigError(f"{name}: {module} {what} {attribute}")
    function: Callable[..., Any] = found
    return function


def _split(name: str) -> tuple[str, str]:
    module, colon, attribute = name.partition(":")
    if not (colon and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise ConfigError(f'"{name}" is no function, expected module:function, such as rewards:brevity')
    return module, attribute


@contextmanager
def _here_on_path() -> Iterator[None]:
    """Let modules of the current folder be found, as `python` would, and `mlxchat` alone would not."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)
