"""Ranks of a ring on this machine, each a process with one core, for tests.

`run_ranks` calls a function of a test file on every rank, `lead_ranks` only on rank 0, which the others follow.
Arguments and results are JSON data. Functions of the test file may be passed to `Team.call`.
"""

import importlib.util
import inspect
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
SECONDS = 600


def run_ranks(function: Callable[..., Any], size: int, *given: Any) -> list[Any]:
    """Return what the module-level `function(group, *given)` returns on each of `size` ranks."""
    return _call(function, size, given, follow=False)


def lead_ranks(function: Callable[..., Any], size: int, *given: Any) -> Any:
    """Return what `function(team, *given)` returns on rank 0, whose team has `size` ranks; the others follow."""
    return _call(function, size, given, follow=True)[0]


def _call(function: Callable[..., Any], size: int, given: tuple[Any, ...], *, follow: bool) -> list[Any]:
    """Run the ranks; fail with their output if one fails or all take longer than SECONDS."""
    order = {"file": inspect.getsourcefile(function), "function": function.__qualname__, "given": given}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, ranks = Path(name), []
        hosts = folder / "hosts.json"
        first = first_of_free_ports(size)
        hosts.write_text(json.dumps([[f"127.0.0.1:{first + rank}"] for rank in range(size)]))
        for rank in range(size):
            path = os.pathsep.join([str(TESTS), *sys.path])
            variables = {"PYTHONPATH": path, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
            said = stack.enter_context((folder / f"{rank}.txt").open("wb"))
            command = [sys.executable, "-m", "distributed.ranks", json.dumps({**order, "follow": follow})]
            command += [str(folder / f"{rank}.json")]
            process = subprocess.Popen(command, env=os.environ | variables, stdout=said, stderr=said)
            stack.callback(process.wait)
            stack.callback(process.kill)
            ranks.append(process)
        until = time.monotonic() + SECONDS
        while None in (codes := [rank.poll() for rank in ranks]) and not any(codes) and time.monotonic() < until:
            time.sleep(0.02)
        texts = [f"--- rank {rank}\n{(folder / f'{rank}.txt').read_text()}" for rank in range(size)]
        assert codes == [0] * size, "\n".join(texts)
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def first_of_free_ports(count: int) -> int:
    """Return the first of neighbouring ports that nobody uses now, below those that systems give out by themselves."""
    while True:
        first = random.randrange(20_000, 32_000)
        with ExitStack() as stack, suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def _be_a_rank(order: dict[str, Any], result: Path) -> None:
    import mlxchat  # isort: split

    import mlx.core as mx

    from mlxchat.cpu import runtime
    from mlxchat.distributed.team import Group, Team

    assert mlxchat
    mx.set_default_device(mx.cpu)
    runtime.set_blas_threads(1)
    group = Group(mx.distributed.init(backend="ring", strict=True), "ring")
    team, found = Team(group), None
    function = getattr(_module_of(Path(order["file"])), order["function"])
    if order["follow"] and not group.leads:
        team.follow()
    else:
        found = function(team if order["follow"] else group, *order["given"])
        if order["follow"]:
            group.share_json(None)
    result.write_text(json.dumps(found))


def _module_of(file: Path) -> Any:
    """Return a test's file as a module of mlxchat: a team calls no others."""
    name = f"mlxchat.of_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


if __name__ == "__main__":
    _be_a_rank(json.loads(sys.argv[1]), Path(sys.argv[2]))
