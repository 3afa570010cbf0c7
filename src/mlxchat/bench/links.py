"""`mlxchat bench links`: sums and gatherings of ranks on this machine, against the formula of the paper plan.

Each rank is a process; they talk over loopback, so this is no measurement of a network. It tells what a message costs
beside the wire, and whether `machines.sum_seconds` and `gather_seconds` say rightly how times grow with ranks and
bytes.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from mlxchat.bench.machines import Link, gather_seconds, sum_seconds
from mlxchat.config import Config
from mlxchat.errors import StepFailed

SIZES = (4096, 1 << 20, 1 << 24, 1 << 26)
_RANKS = (2, 3)
_LIMIT_SECONDS = 240.0


def measure_links(config: Config) -> dict[str, Any]:
    """Return the best times of sums and gatherings with 2 and 3 ranks, and what the formula makes of the first ones.

    The best, since whoever waits for a neighbour that another program keeps from its core measures that program.

    Raises:
        StepFailed: a rank did not end.
    """
    measured = [row for ranks in _RANKS for row in _measure(ranks, config.bench.steps)]
    return {"kind": "ring on loopback", "cores": os.cpu_count(), **compare(measured)}


def compare(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Fit latency and bandwidth to the sums of two ranks; return them with every row beside its prediction.

    Args:
        measured: ranks, operation (sum or gather), bytes and seconds of each.
    """
    pairs = {row["bytes"]: row["seconds"] for row in measured if row["ranks"] == 2 and row["operation"] == "sum"}
    small, large = min(pairs), max(pairs)
    rate = (large - small) / max(1e-12, pairs[large] - pairs[small])
    link = Link(
        name="loopback", bytes_per_second=rate, latency_seconds=max(0.0, pairs[small] - small / rate) / 2, source="fit"
    )
    seconds = {"sum": sum_seconds, "gather": gather_seconds}
    rows = [
        row | {"predicted_seconds": seconds[row["operation"]](row["bytes"], row["ranks"], link)} for row in measured
    ]
    return {"bytes_per_second": link.bytes_per_second, "latency_seconds": link.latency_seconds, "rows": rows}


def _measure(ranks: int, repetitions: int) -> list[dict[str, Any]]:
    with ExitStack() as stack, tempfile.TemporaryDirectory() as name:
        with ExitStack() as ports:
            sockets = [ports.enter_context(socket.socket()) for _ in range(ranks)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            hosts = [[f"127.0.0.1:{each.getsockname()[1]}"] for each in sockets]
        file = Path(name) / "hosts.json"
        file.write_text(json.dumps(hosts))
        processes = []
        for rank in range(ranks):
            environ = os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(file), "OPENBLAS_NUM_THREADS": "1"}
            process = subprocess.Popen(
                [sys.executable, "-m", "mlxchat.bench.links", str(repetitions)], env=environ, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            stack.callback(process.communicate)
            stack.callback(process.kill)
            processes.append(process)
        try:
            text, errors = processes[0].communicate(timeout=_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise StepFailed(f"{ranks} ranks did not end within {_LIMIT_SECONDS:.0f} seconds") from None
        if processes[0].returncode:
            raise StepFailed(
                f"a rank failed: {errors.strip().splitlines()[-1] if errors.strip() else 'without a word'}"
            )
        rows: list[dict[str, Any]] = json.loads(text.splitlines()[-1])
        return rows


def _be_a_rank(repetitions: int) -> None:
    """Measure in this process; rank 0 prints."""
    import mlx.core as mx

    from mlxchat.distributed.group import Group

    group = Group(raw=mx.distributed.init(backend="ring", strict=True), backend="ring")
    rows = []
    for size in SIZES:
        array = mx.ones(size // 4)
        mx.eval(array)
        for operation in ("sum", "gather"):
            times = []
            for _ in range(repetitions + 1):
                group.sum({"ready": mx.zeros(1)})
                began = time.perf_counter()
                mx.eval(group.sum({"x": array}) if operation == "sum" else group.gather(array))
                times.append(time.perf_counter() - began)
            rows.append({"ranks": group.size, "operation": operation, "bytes": size,
                         "seconds": min(times[1:]), "median_seconds": statistics.median(times[1:])})  # fmt: skip
    if group.leads:
        print(json.dumps(rows))


def print_tables(record: dict[str, Any], stream: TextIO) -> None:
    """Print the measurement as Markdown."""
    print(
        f"{record['kind']}, {record['cores']} cores. Fitted to the sums of two ranks: "
        f"{record['bytes_per_second'] / 1e9:.2f} GB/s, {record['latency_seconds'] * 1e6:.0f} µs a message.\n",
        file=stream,
    )
    print(
        "| ranks | operation | bytes | best | median | formula | best / formula |\n|---|---|---|---|---|---|---|",
        file=stream,
    )
    for row in record["rows"]:
        measured, predicted = row["seconds"], row["predicted_seconds"]
        print(
            f"| {row['ranks']} | {row['operation']} | {row['bytes']:,} | {measured * 1e3:.2f} ms | "
            f"{row['median_seconds'] * 1e3:.2f} ms | {predicted * 1e3:.2f} ms | "
            f"{measured / max(1e-12, predicted):.2f} |",
            file=stream,
        )


if __name__ == "__main__":
    import mlxchat

    assert mlxchat  # imported before MLX, so that a fast BLAS is loaded first
    _be_a_rank(int(sys.argv[1]))
