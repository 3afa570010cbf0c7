"""`mlxchat sweep=tpe`: resumes after kills, tolerates failed trials, refuses mistakes."""

import json
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("optuna")

from optuna.distributions import FloatDistribution
from optuna.trial import create_trial

from kit.commands import run_captured
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


def test_search_prints_its_best_trial_and_command(undisturbed, say):
    outputs, text, _ = undisturbed
    trials = told(outputs)
    assert [(number, status) for number, _, status, _ in trials] == [(n, "done") for n in (1, 2, 3, 4)]
    best = min(trials, key=lambda trial: trial[3])
    assert f"best: trial {best[0]}/4 " in text
    command = re.search(r"^its command: mlxchat (.*)$", text, re.MULTILINE)
    assert say("plan", *shlex.split(command[1])).splitlines()[-1].startswith("3 steps: 3 done")


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
def test_killed_search_ends_like_an_uninterrupted_one(point, undisturbed, mlxchat, short, tmp_path, say):
    command = [*short, *SEARCH, f"outputs={tmp_path}/outputs"]
    killed = mlxchat(*command, environ={"MLXCHAT_CRASH_AT": point})
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    say(*command)
    assert told(tmp_path / "outputs") == told(undisturbed[0])


def test_finished_search_runs_nothing_again(undisturbed, say):
    outputs, _, command = undisturbed
    before = told(outputs)
    text = say(*command)
    assert "──" not in text
    assert "best: trial " in text
    assert told(outputs) == before
    assert "seed: 0 → 1" in say(*command, "sweep.seed=1", code=2), "another search needs another name"


def test_search_folder_does_not_shadow_the_run_name(outputs, tiny, say):
    (run,) = (outputs / "runs").iterdir()
    settings = ["sweep=tpe", "sweep.trials=2", "sweep.metric=tokenizer.bytes_per_token", f"outputs={outputs}"]
    say(*tiny, *settings, "tokenizer.vocab_size=choice(280,330)", "sweep.seed=1")
    assert [path.name for path in (outputs / "multirun").iterdir()] == ["smoke-search"]
    rows = json.loads((outputs / "multirun" / "smoke-search" / "table.json").read_text())

    def compared(name: str) -> list[str]:
        return [row["name"] for row in json.loads(say("compare", name, "--format", "json", f"outputs={outputs}"))]

    assert run.name in compared("smoke")
    assert compared("smoke-search") == [f"tokenizer.vocab_size={row['tokenizer.vocab_size']}" for row in rows]
    report = say("report", run.name, "smoke-search", f"outputs={outputs}")
    assert Path(report.splitlines()[-1].removeprefix("report: ")).is_file()


def test_failed_trials_do_not_stop_the_search(outputs, tiny, say):
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
        (["sweep=tpe", "seed=1,2", "hydra/launcher=joblib"], "submitit_local runs jobs elsewhere"),
        (["sweep=halving", "seed=1,2", "sweep.metric=pretrain.tokens_per_second"], "(?s)only at the end.*val_bpb"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_refused_before_anything_is_written(arguments, message, tmp_path, say):
    text = say(*arguments, f"outputs={tmp_path}/outputs", code=2)
    assert re.search(message, text), text
    assert not (tmp_path / "outputs").exists()


def test_missing_optuna_names_the_extra(tmp_path, monkeypatch, say):
    monkeypatch.setattr("mlxchat.sweep.search.importlib.util.find_spec", lambda name: None)
    assert "pip install 'mlxchat[search]'" in say("sweep=tpe", "seed=1,2", f"outputs={tmp_path}/outputs", code=2)


def test_results_and_direction_guide_the_choice():
    space: Any = {"x": FloatDistribution(-4.0, 4.0)}
    told = [create_trial(params={"x": x}, distributions=space, value=x) for x in np.linspace(-4, 4, 17)]

    def chosen(direction: Any) -> float:
        found = [ask(space, told, number=18, seed=seed, random_trials=4, direction=direction) for seed in range(5)]
        return float(np.mean([trial.params["x"] for trial in found]))

    assert chosen("minimize") < -1
    assert chosen("maximize") > 1
