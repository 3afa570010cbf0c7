"""`sweep=halving`: bad trials stop early and keep their state."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from kit.commands import run_captured
from mlxchat.sweep.search import Trials

SETTINGS = [
    "sweep=halving", "sweep.name=h", "sweep.trials=4", "sweep.factor=2", "pretrain.num_iterations=12",
    "pretrain.eval_every=2", "optimizer.matrix_lr=tag(log,interval(0.001,0.3))",
]  # fmt: skip


def rows_of(outputs: Path) -> dict[int, dict[str, Any]]:
    return {row["job"]: row for row in Trials(outputs / "multirun" / "h" / "journal.log").rows()}


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory, tiny: tuple[str, ...]) -> tuple[Path, list[str]]:
    """Four trials of real pretrainings: the outputs, and the command."""
    outputs = tmp_path_factory.mktemp("halving") / "outputs"
    command = [*tiny, *SETTINGS, f"outputs={outputs}"]
    done = run_captured(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    return outputs, command


def expected_end(number: int, rows: dict[int, dict[str, Any]]) -> int | None:
    """Return the iteration at which a trial must stop: where at a rung it is not in the best half of those so far."""
    curves = {each: {int(at): value for at, value in row["curve"].items()} for each, row in rows.items()}
    rungs = [2**power for power in range(4)]

    def at_rung(each: int, rung: int) -> float | None:
        return next((value for at, value in sorted(curves[each].items()) if at >= rung), None)

    for at in sorted(curves[number]):
        for rung in (rung for rung in rungs if rung <= at):
            reached = [value for each in range(1, number + 1) if (value := at_rung(each, rung)) is not None]
            own = at_rung(number, rung)
            assert own is not None
            if own > sorted(reached)[max(1, len(reached) // 2) - 1]:
                return at
    return None


def test_trials_outside_the_best_stop_at_a_rung(halved):
    rows = rows_of(halved[0])
    assert {row["status"] for row in rows.values()} == {"pruned", "done"}
    assert {number: row.get("iterations") for number, row in rows.items()} == {
        number: expected_end(number, rows) for number in rows
    }
    attempts = [len(path.read_text().splitlines()) for path in (halved[0] / "work").glob("*/attempts.jsonl")]
    pruned = sum(row["status"] == "pruned" for row in rows.values())
    assert len(attempts) == pruned, "each pruned trial keeps its state"


def test_pruned_trial_resumes_when_run_alone(halved, say):
    outputs, command = halved
    row = next(row for row in rows_of(outputs).values() if row["status"] == "pruned")
    rate = row["overrides"]["optimizer.matrix_lr"]
    settings = [item for item in command if not item.startswith(("sweep", "optimizer.matrix_lr"))]
    say(*settings, f"optimizer.matrix_lr={rate}", "stage=pretrain")
    manifests = [json.loads(path.read_text()) for path in (outputs / "store").glob("pretrain-*/manifest.json")]
    (made,) = (each for each in manifests if each["config"]["optimizer"]["matrix_lr"] == rate)
    assert made["attempts"][-1]["resumed_from"] == row["iterations"]
    assert [each["outcome"] for each in made["attempts"]] == ["interrupted", "done"]


@pytest.mark.slow
@pytest.mark.parametrize("point", ["search.told:2", "train.iteration:5"])
def test_killed_halving_ends_with_the_same_trials(point, halved, tiny, mlxchat, tmp_path):
    command = [*tiny, *SETTINGS, f"outputs={tmp_path}/outputs"]
    killed = mlxchat(*command, environ={"MLXCHAT_CRASH_AT": point})
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    again = mlxchat(*command)
    assert again.returncode == 0, again.stdout + again.stderr

    def results(outputs: Path) -> list[Any]:
        rows = rows_of(outputs).values()
        return sorted((row["job"], row["status"], row["overrides"], row["curve"], row["value"]) for row in rows)

    assert results(tmp_path / "outputs") == results(halved[0])
