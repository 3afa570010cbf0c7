"""The servers of tests/serve, and a browser."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "serve_fixtures", Path(__file__).parents[1] / "serve" / "conftest.py"
)  # fmt: skip
assert _spec is not None
assert _spec.loader is not None
_serve = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_serve)
tokenizer, model, served, start = _serve.tokenizer, _serve.model, _serve.served, _serve.start
