"""Ranks of a ring on this machine, each a process of one core, for tests; killed when the test is over.

`run_ranks` has every rank call a function of a test file, `lead_ranks` only rank 0, while the others follow it.
What goes in and comes out is JSON data. Functions of the test's own file
may be given to `Team.call`.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

_MODULE = "mlxchat.of_the_test"
_TESTS = Path(__file__).parents[1]


def run_ranks(function: Callable[..., Any], size: int, *given: Any, seconds: float = 60) -> list[Any]:
    """Return what `function(group, *given)` returns on each of `size` ranks.

    Args:
        function: of a module's top level, by name.
        size: ranks.
        given: JSON data.
        seconds: after which all are killed and the test fails.
    """
    return _start(function, size, given, seconds, follow=False)


def lead_ranks(function: Callable[..., Any], size: int, *given: Any, seconds: float = 60) -> Any:
    """Return what `function(team, *given)` returns on rank 0, whose team has `size` ranks; the others follow."""
    return _start(function, size, given, seconds, follow=True)[0]


def _start(
    function: Callable[..., Any], size: int, given: tuple[Any, ...], seconds: float, *, follow: bool
) -> list[Any]:
    source = inspect.getsourcefile(function)
    assert source is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
        order = {"file": source, "function": function.__qualname__, "given": given, "follow": follow}
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(size):
                with (folder / f"{rank}.err").open("wb") as errors:
                    ranks.append(
                        subprocess.Popen(
                            [sys.executable, "-m", "kit.ranks", json.dumps(order), str(folder / f"{rank}.json")],
                            env=os.environ
                            | {"PYTHONPATH": str(_TESTS), "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
                            stdout=errors,
                            stderr=errors,
                            start_new_session=True,
                        )
                    )
            _wait(ranks, folder, time.monotonic() + seconds)
            return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
        finally:
            for process in ranks:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that nobody uses now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait(ranks: list[subprocess.Popen[bytes]], folder: Path, until: float) -> None:
    """Return when all have ended well; fail with what they said when one has not, or it takes too long."""
    while any(process.poll() is None for process in ranks):
        if any(process.poll() for process in ranks) or time.monotonic() > until:
            break
        time.sleep(0.02)
    codes = [process.poll() for process in ranks]
    if any(code != 0 for code in codes):
        said = "\n".join(f"--- rank {rank}\n{(folder / f'{rank}.err').read_text()}" for rank in range(len(ranks)))
        raise AssertionError(f"ranks ended with {codes} (None: it was still at work)\n{said}")


def _be_a_rank(order: dict[str, Any], result: Path) -> None:
    import mlxchat  # isort: split

    import mlx.core as mx

    from mlxchat.cpu import runtime
    from mlxchat.distributed.group import Group
    from mlxchat.distributed.team import Team

    assert mlxchat
    mx.set_default_device(mx.cpu)
    runtime.set_blas_threads(1)
    group = Group(mx.distributed.init(backend="ring", strict=True), "ring")
    team, found = Team(group), None
    # A team calls functions of mlxchat alone: those of the test's file belong to it here.
    spec = importlib.util.spec_from_file_location(_MODULE, order["file"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module
    spec.loader.exec_module(module)
    if order["follow"] and not group.leads:
        team.follow()
    else:
        found = getattr(module, order["function"])(team if order["follow"] else group, *order["given"])
        if order["follow"]:
            group.share_json(None)
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    _be_a_rank(json.loads(sys.argv[1]), Path(sys.argv[2]))
