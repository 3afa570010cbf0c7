"""How a run gets its ranks: variables of launchers, comparison of versions, settings."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kit import ranks
from mlxchat.composition.compose import compose_config
from mlxchat.distributed.ranks import Meeting, Ranks, computes, find_meeting, lead_ranks
from mlxchat.distributed.watch import Line, Watch, code_digest, connect, find_facts, listen_at
from mlxchat.errors import ConfigError, StepFailed
from mlxchat.ops import machine as machine_module
from mlxchat.sweep.job import remark_few_rows


def write(folder: Path, value: Any) -> str:
    path = folder / "hosts.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


def test_a_single_process_has_no_ranks(tmp_path):
    """Started alone, or by `mlx.launch -n 1`."""
    for variables in ({}, {"MLX_RANK": "0"}, {"MLX_RANK": "0", "MLX_HOSTFILE": write(tmp_path, "\n")}):
        assert find_meeting(variables) is None
    given = machine()
    assert lead_ranks(given) == (given, None)


def test_rank_0_listens_one_port_above_those_of_mlx(tmp_path):
    hosts = [["10.0.0.1:5000", "10.0.1.1:5001"], ["10.0.0.2:5002", "10.0.1.2:5003"]]
    ring = {"MLX_RANK": "1", "MLX_HOSTFILE": write(tmp_path, hosts)}
    assert find_meeting(ring) == Meeting(
        rank=1, size=2, backend="ring", address=("10.0.0.1", 5004), hosts=["10.0.0.1", "10.0.0.2"]
    )
    devices = write(tmp_path, [[None, "rdma_en2"], ["rdma_en3", None]])
    jaccl = {"MLX_RANK": "0", "MLX_IBV_DEVICES": devices, "MLX_JACCL_COORDINATOR": "192.168.1.10:32323"}
    assert find_meeting(jaccl) == Meeting(rank=0, size=2, backend="jaccl", address=("192.168.1.10", 32324))
    nccl = {"MLX_RANK": "3", "MLX_WORLD_SIZE": "4", "NCCL_HOST_IP": "10.0.0.1", "NCCL_PORT": "12345"}
    assert find_meeting(nccl) == Meeting(rank=3, size=4, backend="nccl", address=("10.0.0.1", 12346))


@pytest.mark.parametrize(
    ("rank", "hosts", "message"),
    [
        ("2", [["a:1"], ["b:2"]], "MLX_RANK is 2, expected 0 to 1: there are 2 ranks"),
        ("one", [["a:1"], ["b:2"]], "MLX_RANK is 'one', expected a whole number"),
        ("0", "[[", "cannot be read as JSON"),
        ("0", [["a"], ["b"]], '"a" is not a port: expected addresses of ranks as HOST:PORT'),
    ],
)
def test_an_unusable_hostfile_is_a_config_error(tmp_path, rank, hosts, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        find_meeting({"MLX_RANK": rank, "MLX_HOSTFILE": write(tmp_path, hosts)})


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", True), ("run", True), ("model=d4 seed=1", True), ("-m seed=1,2", True), ("run --plan FILE", True),
        ("plan", False), ("run --help", False), ("--version", False), ("--cfg job", False),
    ],
)  # fmt: skip
def test_only_run_uses_all_ranks(line, expected):
    assert computes(line.split()) is expected


def meet(others: list[dict[str, Any]], size: int, seconds: float = 5) -> Watch:
    """Return rank 0's watch after these have connected."""
    watch, lines = Watch(find_facts(0), size), list[Line]()
    with listen_at("127.0.0.1", 0) as listener:

        def come() -> None:
            for facts in others:
                lines.append(connect(listener.getsockname()[:2], 5))
                lines[-1].send({"kind": "hello", "facts": facts})

        thread = threading.Thread(target=come)
        thread.start()
        try:
            watch.gather(listener, seconds, lambda: None, ["10.0.0.1", "10.0.0.2", "10.0.0.3"][:size])
        finally:
            thread.join()
            watch.leave()
            for line in lines:
                line.close()
    return watch


def test_equal_ranks_connect_in_any_order():
    strangers = [{"rank": 0}, {"rank": 3}, {"rank": "1"}, {}]
    watch = meet([*strangers, find_facts(2), find_facts(1)], 3)
    assert sorted(watch.facts) == [0, 1, 2]
    assert watch.facts[1] == find_facts(1)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mlxchat", "9.9", "mlxchat is 9.9 there and"),
        ("code", "0" * 12, f"code of mlxchat (digest) is {'0' * 12} there and {code_digest()} here"),
        ("backend", "metal", "backend is metal there and cpu here"),
    ],
)
def test_a_rank_with_another_version_is_named_with_its_host(key, value, message):
    other = find_facts(2) | {"host": "mini2", key: value}
    with pytest.raises(ConfigError) as refused:
        meet([find_facts(1), other], 3)
    assert "rank 2 (process" in str(refused.value)
    assert "on mini2) cannot work with rank 0 on" in str(refused.value)
    assert message in str(refused.value)
    assert "rank 1" not in str(refused.value)


def test_a_missing_rank_is_named_with_its_host():
    with pytest.raises(StepFailed, match=re.escape("rank 2 (10.0.0.3) did not connect within 1 seconds")):
        meet([find_facts(1)], 3, seconds=1)


# As with mpi: the ranks join the group before they know the address of rank 0.
GROUP_FIRST = """
import mlxchat, os, sys
from mlxchat.distributed.ranks import Meeting, _meet, current, follow
rank = int(os.environ["MLX_RANK"])
meeting = Meeting(rank=rank, size=2, backend="ring", address=None)
if rank == 0:
    _meet(meeting)
    print(current().describe()["size"], "ranks")
else:
    sys.exit(follow(meeting))
"""


def test_without_an_address_ranks_learn_it_in_the_group(tmp_path):
    hosts = write(tmp_path, [[f"127.0.0.1:{port}"] for port in ranks.free_ports(2)])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", GROUP_FIRST], env=os.environ | {"MLX_RANK": rank, "MLX_HOSTFILE": hosts},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=60)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], printed
    assert "2 ranks" in printed[0].splitlines()


def machine(*settings: str) -> Any:
    return compose_config(["experiment=smoke", *settings]).config.machine


@pytest.mark.parametrize(("cores", "size", "threads"), [(8, 2, 4), (8, 3, 2), (2, 4, 1)])
def test_ranks_share_the_cores_of_their_machine(monkeypatch, cores, size, threads):
    monkeypatch.setattr(machine_module, "available_cores", lambda: cores)
    shared, lead = lead_ranks(machine(f"machine.num_processes={size}"))
    assert shared.blas_threads == threads
    assert isinstance(lead, Ranks)
    shared, _ = lead_ranks(machine(f"machine.num_processes={size}", "machine.blas_threads=3"))
    assert shared.blas_threads == 3, "an explicit setting is not divided"


def test_more_ranks_than_rows_gives_a_remark():
    batches = {"pretrain": (1024, False), "midtrain": (2048, False), "sft": (None, False), "rl": (512, True)}
    config: Any = SimpleNamespace(**{
        name: SimpleNamespace(batch=SimpleNamespace(tokens=tokens, row_tokens=512))
        for name, (tokens, _) in batches.items()
    })  # fmt: skip
    plan: Any = [
        SimpleNamespace(name=name, stage=SimpleNamespace(name=name), config=config, done=done)
        for name, (_, done) in {**batches, "eval": (None, False)}.items()
    ]
    (line,) = remark_few_rows(plan, 3)
    assert line == "pretrain   has 2 rows per iteration for 3 ranks: some ranks are idle"
