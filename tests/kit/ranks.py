"""Ranks of a ring on this machine, each a process with one core, for tests.

`run_ranks` calls a function of a test file on every rank, `lead_ranks` only on rank 0, which the others follow.
Arguments and results are JSON data. Functions of the test file may be passed to `Team.call`.

Ranks take 2.6 seconds to start, so they are reused by later tests of the same size, and end with this process. Changes
of modules and MLX's caches persist between tests; `fresh` ranks are used for one call only.
"""

import atexit
import importlib.util
import inspect
import json
import os
import random
import shutil
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

_TESTS = Path(__file__).parents[1]


def run_ranks(
    function: Callable[..., Any], size: int, *given: Any, seconds: float = 600, fresh: bool = False
) -> list[Any]:
    """Return what `function(group, *given)` returns on each of `size` ranks.

    Args:
        function: a module-level function.
        size: number of ranks.
        given: JSON data.
        seconds: time limit, after which all are killed and the test fails.
        fresh: use new ranks that end afterwards.
    """
    return _call(function, size, given, seconds, follow=False, fresh=fresh)


def lead_ranks(function: Callable[..., Any], size: int, *given: Any, seconds: float = 600, fresh: bool = False) -> Any:
    """Return what `function(team, *given)` returns on rank 0, whose team has `size` ranks; the others follow."""
    return _call(function, size, given, seconds, follow=True, fresh=fresh)[0]


class _Ring:
    """Ranks that wait for calls."""

    def __init__(self, size: int) -> None:
        self.folder, self.calls = Path(tempfile.mkdtemp()), 0
        hosts = self.folder / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
        self.ranks: list[subprocess.Popen[bytes]] = []
        for rank in range(size):
            with (self.folder / f"{rank}.err").open("wb") as errors:
                path = os.pathsep.join([str(_TESTS), *sys.path])
                variables = {"PYTHONPATH": path, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
                self.ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "kit.ranks"], env=os.environ | variables,
                        stdin=subprocess.PIPE, stdout=errors, stderr=errors, start_new_session=True,
                    )
                )  # fmt: skip

    def call(self, order: dict[str, Any], seconds: float, *, is_last: bool) -> list[Any]:
        """Return the ranks' results; fail with what they said when one has ended without, or it takes too long."""
        self.calls += 1
        results = [self.folder / f"{self.calls}-{rank}.json" for rank in range(len(self.ranks))]
        for rank, result in zip(self.ranks, results, strict=True):
            with suppress(BrokenPipeError):
                rank.stdin.write(json.dumps({**order, "result": str(result)}).encode() + b"\n")
                rank.stdin.flush()
                if is_last:
                    rank.stdin.close()  # at which a rank ends once it has returned
        until = time.monotonic() + seconds
        while not all(result.exists() for result in results):
            lost = [rank.poll() for rank, result in zip(self.ranks, results, strict=True) if not result.exists()]
            if any(lost) or time.monotonic() > until:
                codes = [rank.poll() for rank in self.ranks]
                said = "\n".join(f"--- {path.stem}\n{path.read_text()}" for path in sorted(self.folder.glob("*.err")))
                raise AssertionError(f"ranks ended with {codes} (None: it was still at work)\n{said}")
            time.sleep(0.02)
        return [json.loads(result.read_text()) for result in results]

    def end(self) -> None:
        for rank in self.ranks:
            with suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()
            with suppress(BrokenPipeError):  # an order that it did not read
                rank.stdin.close()
        shutil.rmtree(self.folder, ignore_errors=True)


_rings: dict[int, _Ring] = {}


@atexit.register
def _end_all() -> None:
    while _rings:
        _rings.popitem()[1].end()


def _call(
    function: Callable[..., Any], size: int, given: tuple[Any, ...], seconds: float, *, follow: bool, fresh: bool
) -> list[Any]:
    source = inspect.getsourcefile(function)
    assert source is not None
    ring = _Ring(size) if fresh else _rings.pop(size, None) or _Ring(size)
    order = {"file": source, "function": function.__qualname__, "given": given, "follow": follow}
    try:
        found = ring.call(order, seconds, is_last=fresh)
    except BaseException:
        ring.end()
        raise
    if fresh:
        ring.end()
    else:
        _rings[size] = ring
    return found


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that nobody uses now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def first_of_free_ports(count: int) -> int:
    """Return the first of neighbouring ports that nobody uses now, below those that systems give out by themselves."""
    while True:
        first = random.randrange(20_000, 32_000)
        with ExitStack() as stack, suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def _be_a_rank() -> None:
    import mlxchat  # isort: split

    import mlx.core as mx

    from mlxchat.cpu import runtime
    from mlxchat.distributed.group import Group
    from mlxchat.distributed.team import Team

    assert mlxchat
    mx.set_default_device(mx.cpu)
    group = Group(mx.distributed.init(backend="ring", strict=True), "ring")
    while text := sys.stdin.readline():
        order = json.loads(text)
        runtime.set_blas_threads(1)
        team, found = Team(group), None
        function = getattr(_module_of(Path(order["file"])), order["function"])
        if order["follow"] and not group.leads:
            team.follow()
        else:
            found = function(team if order["follow"] else group, *order["given"])
            if order["follow"]:
                group.share_json(None)
        result = Path(order["result"])
        result.with_suffix(".new").write_text(json.dumps(found))
        result.with_suffix(".new").rename(result)


def _module_of(file: Path) -> Any:
    """Return a test's file as a module of mlxchat: a team calls no others."""
    name = f"mlxchat.of_{file.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


if __name__ == "__main__":
    _be_a_rank()
