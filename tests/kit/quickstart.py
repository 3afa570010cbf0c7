"""docs/quickstart_data.py as a module: what generates the data of the quick run."""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType


@cache
def generator() -> ModuleType:
    """Return the module."""
    path = Path(__file__).resolve().parents[2] / "docs" / "quickstart_data.py"
    spec = importlib.util.spec_from_file_location("quickstart_data", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
