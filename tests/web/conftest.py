"""The servers of tests/serve, a browser, and Node.js for modules without a DOM."""

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
import { readFileSync } from "node:fs";
const [place, given] = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify((CODE)(await import(place), given)));
"""


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Call a JavaScript function with (a module of the page, JSON); without Node.js the test is skipped."""
    if shutil.which("node") is None:
        pytest.skip("no Node.js on this machine")
    folder = shutil.copytree(PAGE, tmp_path_factory.mktemp("node") / "page")
    (folder / "package.json").write_text('{"type": "module"}')

    def run(module: str, code: str, given: Any) -> Any:
        command = ["node", "--input-type=module", "-e", _NODE.replace("CODE", code)]
        given = json.dumps([(folder / module).as_uri(), given])
        done = subprocess.run(command, input=given, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
