"""MLX's own launcher starts mlxchat's ranks: rank 0 runs the command, the others follow it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mlxchat as mlxchat_module
from kit import ranks

LAUNCHER = Path(sys.executable).with_name("mlx.launch")
pytestmark = pytest.mark.skipif(not LAUNCHER.exists(), reason="mlx.launch is not installed")


@pytest.fixture
def launch() -> Callable[..., subprocess.Popen[str]]:
    """Start `mlx.launch -n 2 -- mlxchat ARGUMENTS`."""

    def start(*arguments: str | Path, hosts: tuple[str, ...] = ("-n", "2"), **variables: str) -> subprocess.Popen[str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("MLXCHAT", "MLX_", "PYTHON"))}
        port = ranks.first_of_free_ports(8)  # the launcher counts up from it
        return subprocess.Popen(
            [str(LAUNCHER), *hosts, "-p", str(port), "--", sys.executable, "-m", "mlxchat", *map(str, arguments)],
            env=clean | variables, stdin=subprocess.DEVNULL, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start


@pytest.fixture
def two_hosts(tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """Return options of `launch` for this host and a second one: this one through a fake ssh, with other variables."""

    def make(other: str) -> dict[str, Any]:
        hosts = [{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}, {"ssh": "mini2", "ips": ["127.0.0.1"]}]
        (tmp_path / "hosts.json").write_text(json.dumps({"backend": "ring", "hosts": hosts}))
        (tmp_path / "bin").mkdir()
        ssh = tmp_path / "bin" / "ssh"
        ssh.write_text(
            f'#!/bin/bash\nexport {other}\nfor last in "$@"; do :; done\nexec bash -c "${{last/stty -echo; /}}"\n'
        )
        ssh.chmod(0o755)
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return {"hosts": ("--hostfile", str(tmp_path / "hosts.json")), "PATH": path}

    return make


def test_ranks_of_a_hostfile_connect_and_print_an_error_once(launch, two_hosts, tmp_path):
    process = launch("machine.num_processes=3", "experiment=smoke", f"outputs={tmp_path}", **two_hosts("A=B"))
    text, _ = process.communicate(timeout=60)
    assert "2 ranks compute together (ring)" in text
    assert text.count("error:") == 1, text
    assert "machine.num_processes is 3, but there are 2 ranks already: leave it out" in text


@pytest.mark.slow
def test_a_host_with_another_version_is_refused(launch, two_hosts, tmp_path):
    library = Path(mlxchat_module.__path__[0])
    shutil.copytree(library, tmp_path / "old" / "mlxchat", ignore=shutil.ignore_patterns("__pycache__"))
    init = tmp_path / "old" / "mlxchat" / "__init__.py"
    init.write_text(init.read_text().replace('__version__ = "', '__version__ = "0.0.'))
    hosts = two_hosts(f"PYTHONPATH={tmp_path / 'old'}")
    text, _ = launch("experiment=smoke", f"outputs={tmp_path / 'outputs'}", **hosts).communicate(timeout=60)
    assert text.count("error:") == 1, text
    assert "error: rank 1 (process" in text
    assert f"mlxchat is 0.0.{mlxchat_module.__version__} there and {mlxchat_module.__version__} here" in text
    assert "code of mlxchat (digest) is" in text
    assert not (tmp_path / "outputs").exists()
