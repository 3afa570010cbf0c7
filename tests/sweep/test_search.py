"""`mlxchat sweep=tpe`: resumes after kills, tolerates failed trials, refuses mistakes."""

from __future__ import annotations

import json
import re
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from kit.commands import CommandLine, Say, run_captured
from mlxchat.sweep.search import Trials, ask

SEARCH = [
    "sweep=tpe", "sweep.trials=4", "sweep.random_trials=2", "sweep.name=s",
    "optimizer.embedding_lr=tag(log,interval(0.02,2))", "tokenizer.vocab_size=choice(300,310)",
]  # fmt: skip


def told(outputs: Path) -> list[tuple[Any, ...]]:
    """Return what a journal says of its trials, without times and names of runs."""
    rows = Trials(outputs / "multirun" / "s" / "journal.log").rows()
    return [(row["job"], row["overrides"], row["status"], row.get("value")) for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, short: tuple[str, ...]) -> tuple[Path, str, list[str]]:
    """A finished search: its outputs, what it printed, its command."""
    outputs = tmp_path_factory.mktemp("search") / "outputs"
    command = [*short, *SEARCH, f"outputs={outputs}"]
    done = run_captured(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    return outputs, done.stdout, command


def test_search_prints_its_best_trial_and_command(undisturbed: Any, say: Say) -> None:
    outputs, text, _ = undisturbed
    trials = told(outputs)
    assert [(number, status) for number, _, status, _ in trials] == [(n, "done") for n in (1, 2, 3, 4)]
    best = min(trials, key=lambda trial: trial[3])
    assert f"best: trial {best[0]}/4 " in text
    command = re.search(r"^its command: mlxchat (.*)$", text, re.MULTILINE)
    assert command is not None
    assert say("plan", *shlex.split(command[1])).splitlines()[-1].startswith("3 steps: 3 done")


def test_search_writes_a_table_and_a_plot(undisturbed: Any) -> None:
    outputs = undisturbed[0]
    folder = outputs / "multirun" / "s"
    rows = json.loads((folder / "table.json").read_text())
    assert [row["pretrain.val_bpb"] for row in rows] == pytest.approx(
        sorted(trial[3] for trial in told(outputs)), abs=1e-5
    )
    assert rows[0].keys() >= {"trial", "optimizer.embedding_lr", "pretrain.val_bpb", "status"}
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "point",
    ["search.ended:3"]
    + [
        pytest.param(point, marks=pytest.mark.slow)
        for point in (
            "train.iteration:2", "search.ended", "search.told", "search.told:4", "publish.renamed:4", "step.started:3"
        )
    ],
)  # fmt: skip
def test_killed_search_ends_like_an_uninterrupted_one(
    point: str, undisturbed: Any, mlxchat: CommandLine, short: tuple[str, ...], tmp_path: Path, say: Say
) -> None:
    command = [*short, *SEARCH, f"outputs={tmp_path}/outputs"]
    killed = mlxchat(*command, environ={"MLXCHAT_CRASH_AT": point})
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    say(*command)
    assert told(tmp_path / "outputs") == told(undisturbed[0])


@pytest.mark.slow
def test_killed_trial_resumes_from_its_last_state(
    mlxchat: CommandLine, start_mlxchat: Callable[..., Any], tiny: tuple[str, ...], tmp_path: Path
) -> None:
    outputs = tmp_path / "outputs"
    command = [
        *tiny, "sweep=tpe", "sweep.name=s", "sweep.trials=1", "optimizer.matrix_lr=interval(0.01,0.02)",
        "pretrain.num_iterations=150", "machine.checkpoint_seconds=0", f"outputs={outputs}",
    ]  # fmt: skip
    process = start_mlxchat(*command)
    end = time.monotonic() + 600
    while not list((outputs / "work").glob("*/ckpt/[0-9]*/state.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)
    process.kill()
    process.communicate()
    again = mlxchat(*command)
    assert again.returncode == 0, again.stdout + again.stderr
    (after,) = told(outputs)
    assert (after[0], after[2]) == (1, "done")
    (manifest,) = [json.loads(path.read_text()) for path in (outputs / "store").glob("pretrain-*/manifest.json")]
    assert [attempt["outcome"] for attempt in manifest["attempts"]] == ["killed", "done"]
    assert manifest["attempts"][1]["resumed_from"] > 0


def test_finished_search_runs_nothing_again(undisturbed: Any, say: Say) -> None:
    outputs, _, command = undisturbed
    before = told(outputs)
    text = say(*command)
    assert "──" not in text
    assert "best: trial " in text
    assert told(outputs) == before
    assert "seed: 0 → 1" in say(*command, "sweep.seed=1", code=2), "another search needs another name"


def test_search_folder_does_not_shadow_the_run_name(outputs: Path, tiny: tuple[str, ...], say: Say) -> None:
    (run,) = (outputs / "runs").iterdir()
    settings = ["sweep=tpe", "sweep.trials=2", "sweep.metric=tokenizer.bytes_per_token", f"outputs={outputs}"]
    say(*tiny, *settings, "tokenizer.vocab_size=choice(280,330)", "sweep.seed=1")
    assert [path.name for path in (outputs / "multirun").iterdir()] == ["smoke-search"]
    rows = Trials(outputs / "multirun" / "smoke-search" / "journal.log").rows()

    def compared(name: str) -> list[str]:
        return [row["name"] for row in json.loads(say("compare", name, "--format", "json", f"outputs={outputs}"))]

    assert run.name in compared("smoke")
    assert compared("smoke-search") == [
        f"tokenizer.vocab_size={row['overrides']['tokenizer.vocab_size']}" for row in rows
    ]
    report = say("report", run.name, "smoke-search", f"outputs={outputs}")
    assert Path(report.splitlines()[-1].removeprefix("report: ")).is_file()


def test_failed_trials_do_not_stop_the_search(outputs: Path, tiny: tuple[str, ...], say: Say) -> None:
    settings = ["sweep=tpe", "sweep.name=s", "sweep.trials=3", "tokenizer.vocab_size=choice(280,330,60000)"]
    settings += ["sweep.seed=8", "sweep.metric=tokenizer.bytes_per_token"]
    text = say(*tiny, *settings, f"outputs={outputs}")
    assert {(values["tokenizer.vocab_size"] == "60000", status) for _, values, status, _ in told(outputs)} == {
        (False, "done"), (True, "failed"),
    }  # fmt: skip
    rows = json.loads((outputs / "multirun" / "s" / "table.json").read_text())
    assert [row["status"] for row in rows] == sorted(row["status"] for row in rows)
    assert "tokenizer.vocab_size is 60000" in rows[-1]["error"]
    # More merges never give fewer bytes a token, so the largest vocabulary is the best one.
    tried = [int(row["tokenizer.vocab_size"]) for row in rows if row["status"] == "done"]
    assert tried == sorted(tried, reverse=True)
    assert len(set(tried)) > 1
    (best,) = re.findall(r"^best: trial \d+/3 tokenizer.vocab_size=(\d+)", text, re.MULTILINE)
    assert int(best) == max(tried)
    assert "3 trials for the largest tokenizer.bytes_per_token" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep=tpe"], "a search needs settings that vary"),
        (["sweep=tpa", "seed=1,2"], 'sweep has no option "tpa".* Did you mean "tpe"'),
        (["sweep=tpe", "optimizer.matrx_lr=interval(0,1)"], 'Did you mean "optimizer.matrix_lr"'),
        (["sweep=tpe", "sft.num_epochs=range(0,3)"], "sft.num_epochs is 0, expected at least 1"),
        (["sweep=tpe", "seed=1,2", "sweep.metric=pretran.val_bpb"], 'Did you mean "pretrain.val_bpb"'),
        (["sweep=tpe", "seed=1,2", "sweep.metric=null"], "sweep.metric has no value"),
        (["sweep=tpe", "seed=1,2", "sweep.name=a/b"], "expected a folder name"),
        (["sweep=tpe", "seed=1,2", "hydra/launcher=joblib"], "sequentially in this process"),
        (["sweep=halving", "seed=1,2", "sweep.metric=pretrain.tokens_per_second"], "(?s)only at the end.*val_bpb"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_refused_before_anything_is_written(
    arguments: list[str], message: str, tmp_path: Path, say: Say
) -> None:
    text = say(*arguments, f"outputs={tmp_path}/outputs", code=2)
    assert re.search(message, text), text
    assert not (tmp_path / "outputs").exists()


def test_missing_optuna_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    monkeypatch.setattr("mlxchat.sweep.search.importlib.util.find_spec", lambda name: None)
    assert "pip install 'mlxchat[search]'" in say("sweep=tpe", "seed=1,2", f"outputs={tmp_path}/outputs", code=2)


SPACE: Any = {
    "x": FloatDistribution(-4.0, 4.0),
    "n": IntDistribution(1, 64, log=True),
    "kind": CategoricalDistribution(("a", "b", "c")),
}


def bowl(values: dict[str, Any]) -> float:
    """A function that is least, 0, at x=1, n=8, kind=b."""
    distance = (values["x"] - 1) ** 2 + abs(values["n"] - 8) / 8
    return float(distance + {"a": 2.0, "b": 0.0, "c": 1.0}[values["kind"]])


def chosen(told: list[FrozenTrial], seed: int, *, random_trials: int) -> dict[str, Any]:
    number = len(told) + 1
    return ask(SPACE, told, number=number, seed=seed, random_trials=random_trials, direction="minimize").params


def searched(count: int, seed: int, *, random_trials: int) -> list[FrozenTrial]:
    trials: list[FrozenTrial] = []
    for _ in range(count):
        values = chosen(trials, seed, random_trials=random_trials)
        trials.append(create_trial(params=values, distributions=SPACE, value=bowl(values)))
    return trials


def test_suggested_values_lie_in_the_space() -> None:
    for trial in searched(12, 0, random_trials=4):
        assert -4 <= trial.params["x"] <= 4
        assert trial.params["n"] in range(1, 65)
        assert trial.params["kind"] in ("a", "b", "c")
        assert json.loads(json.dumps(trial.params)) == trial.params


def test_search_beats_random_choice() -> None:
    seeds = range(3)
    guided = [min(bowl(trial.params) for trial in searched(40, seed, random_trials=8)) for seed in seeds]
    chance = [min(bowl(trial.params) for trial in searched(40, seed, random_trials=40)) for seed in seeds]
    assert sum(guided) < 0.6 * sum(chance)


def test_failed_trials_do_not_guide_the_choice() -> None:
    trials = searched(10, 0, random_trials=10)
    assert len({trial.params["x"] for trial in trials}) == 10, "random trials depend on their number"
    failed = [create_trial(state=TrialState.FAIL, params=trials[0].params, distributions=SPACE) for _ in range(4)]
    assert -4 <= chosen(trials + failed, 0, random_trials=4)["x"] <= 4
