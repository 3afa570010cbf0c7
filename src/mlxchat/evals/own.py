"""Users' evaluation functions, named by `eval.own`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mlxchat.config.parts import load_part
from mlxchat.engine.generate import Engine
from mlxchat.errors import StepFailed


def measure_own(engine: Engine, functions: Mapping[str, str]) -> dict[str, float]:
    """Return name → what the function `module:name` returns for a model.

    Raises:
        StepFailed: a function did not return a finite number.
    """
    found = {}
    for name, function in sorted(functions.items()):
        value = load_part(function)(engine)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise StepFailed(f"eval.own.{name}: {function} returned {value!r}, expected a finite number")
        found[name] = float(value)
    return found
