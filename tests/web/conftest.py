"""The servers of tests/serve, and a browser."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location(
    "serve_fixtures", Path(__file__).parents[1] / "serve" / "conftest.py"
)  # fmt: skip
assert _spec is not None
assert _spec.loader is not None
_serve = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_serve)
tokenizer, model, served, start = _serve.tokenizer, _serve.model, _serve.served, _serve.start
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    places = [place for name in BROWSERS if (place := shutil.which(name))]
    if not places:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=places[0], args=["--no-sandbox"])
        yield opened
        opened.close()
