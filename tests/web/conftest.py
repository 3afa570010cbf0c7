"""The servers of tests/serve, a browser, and Node.js for modules of the page that need none."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mlxchat
from kit.serving import model as model
from kit.serving import served as served
from kit.serving import start as start

PAGE = Path(mlxchat.__file__).parent / "serve" / "page"
_NODE = """
const [source, given] = JSON.parse(require("fs").readFileSync(0, "utf8"));
import(source).then((page) => console.log(JSON.stringify((CODE)(page, given))));
"""


@pytest.fixture(scope="session")
def node() -> Callable[..., Any]:
    """Call a JavaScript function with (a module of the page, JSON); without Node.js the test is skipped."""
    if shutil.which("node") is None:
        pytest.skip("no Node.js on this machine")

    def run(module: str, code: str, given: Any) -> Any:
        # Before its version 22.7 Node.js takes a file named .js for an older kind of module.
        source = "data:text/javascript;base64," + base64.b64encode((PAGE / module).read_bytes()).decode()
        command = ["node", "--no-warnings", "-e", _NODE.replace("CODE", code)]
        done = subprocess.run(command, input=json.dumps([source, given]), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
