"""What a run is told of its ranks before any is there."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlxchat.compose import compose_config
from mlxchat.distributed.group import PeerLost
from mlxchat.distributed.ranks import Ranks, lead_ranks
from mlxchat.errors import StepFailed
from mlxchat.ops import machine as machine_module
from mlxchat.pipeline_run import remark_few_rows
from mlxchat.runner.signals import stop_on_signals


def machine(*settings: str) -> Any:
    return compose_config(["experiment=smoke", *settings]).config.machine


def test_one_process_has_no_ranks_and_its_settings_as_they_are() -> None:
    given = machine()
    assert lead_ranks(given) == (given, None)


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(8, 2, 4), (8, 3, 2), (2, 4, 1)])
def test_ranks_share_the_cores_of_their_machine(
    monkeypatch: pytest.MonkeyPatch, cores: int, ranks: int, threads: int
) -> None:
    monkeypatch.setattr(machine_module, "available_cores", lambda: cores)
    shared, lead = lead_ranks(machine(f"machine.num_processes={ranks}"))
    assert shared.blas_threads == threads
    assert isinstance(lead, Ranks)


def test_threads_that_are_given_are_not_shared_out() -> None:
    shared, _ = lead_ranks(machine("machine.num_processes=2", "machine.blas_threads=3"))
    assert shared.blas_threads == 3


def test_more_ranks_than_rows_are_remarked_on() -> None:
    batches = {"pretrain": (1024, False), "midtrain": (2048, False), "sft": (None, False), "rl": (512, True)}
    config: Any = SimpleNamespace(**{
        name: SimpleNamespace(batch=SimpleNamespace(tokens=tokens, row_tokens=512))
        for name, (tokens, _) in batches.items()
    })  # fmt: skip
    plan: Any = [
        SimpleNamespace(name=name, stage=SimpleNamespace(name=name), done=done)
        for name, (_, done) in {**batches, "eval": (None, False)}.items()
    ]
    (line,) = remark_few_rows(config, plan, 3)
    assert line == "pretrain   has 2 rows in an iteration for 3 ranks: some have nothing to train on"


@pytest.fixture
def terminated() -> Iterator[None]:
    """Put the handler of SIGTERM back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("terminated")
def test_a_launcher_that_stops_all_ranks_does_not_silence_why(tmp_path: Path) -> None:
    """mlx.launch sends SIGTERM once a rank has ended, which ended rank 0 before it had told of the loss."""
    ranks: Any = Ranks()
    ranks.watch = SimpleNamespace(cause=lambda: "rank 1 was killed")
    with pytest.raises(StepFailed, match="rank 1 was killed"), stop_on_signals(lambda number: None, lambda: None):
        raise ranks.explain(PeerLost("ring"), tmp_path)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
