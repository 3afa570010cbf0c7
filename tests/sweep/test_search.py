"""`mlxchat sweep=tpe` and `sweep=halving`: the space, the journal, kills, failed and pruned trials, mistakes."""

import json
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from optuna.distributions import CategoricalDistribution as Choice
from optuna.distributions import FloatDistribution as Float
from optuna.distributions import IntDistribution as Int

from kit.commands import run_captured
from mlxchat.config.schema import SweepConfig
from mlxchat.sweep.search import ask, open_study, read_space, rows_of, tell

TPE = [
    "sweep=tpe", "sweep.trials=4", "sweep.random_trials=2", "sweep.name=s",
    "optimizer.embedding_lr=tag(log,interval(0.02,2))", "tokenizer.vocab_size=choice(300,310)",
    "stage=pretrain", "pretrain.num_iterations=1",
]  # fmt: skip
HALVING = [
    "sweep=halving", "sweep.name=s", "sweep.trials=4", "pretrain.num_iterations=12",
    "pretrain.eval_every=2", "optimizer.matrix_lr=tag(log,interval(0.001,0.3))",
]  # fmt: skip


def journal(outputs: Path) -> list[tuple[Any, ...]]:
    """Return what a journal says of its trials, without times and names of runs."""
    path = outputs / "multirun" / "s" / "journal.log"
    study = open_study(path, "minimize", json.loads(path.read_text().splitlines()[0])["study_name"])
    return [(trial.params, trial.state.name, trial.value, trial.intermediate_values) for trial in study.trials]


def searched(factory: pytest.TempPathFactory, tiny: tuple[str, ...], settings: list[str]) -> tuple[Path, str]:
    outputs = factory.mktemp("search") / "outputs"
    done = run_captured(*tiny, *settings, f"outputs={outputs}")
    assert done.returncode == 0, done.stdout + done.stderr
    return outputs, done.stdout


@pytest.fixture(scope="module")
def tpe(tmp_path_factory: pytest.TempPathFactory, tiny: tuple[str, ...]) -> tuple[Path, str]:
    """A finished search: its outputs, and what it printed."""
    return searched(tmp_path_factory, tiny, TPE)


@pytest.fixture(scope="module")
def halving(tmp_path_factory: pytest.TempPathFactory, tiny: tuple[str, ...]) -> tuple[Path, str]:
    """Four trials of real pretrainings."""
    return searched(tmp_path_factory, tiny, HALVING)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("interval(0.1,1)", Float(0.1, 1.0)),
        ("tag(log,interval(0.001,1))", Float(0.001, 1.0, log=True)),
        ("int(interval(1,8))", Int(1, 8)),
        ("tag(log,int(interval(1,8)))", Int(1, 8, log=True)),
        ("range(1,10,4)", Int(1, 9, step=4)),
        ("choice(d2,d4)", Choice(("d2", "d4"))),
        ("1,2,2", Choice(("1", "2"))),
    ],
)
def test_hydra_expressions_become_distributions(expression, expected):
    for overrides in ([f"seed={expression}"], [f'sweep.space.seed="{expression}"']):
        assert read_space(overrides, [])[1] == {"seed": expected}


def test_command_line_overrides_the_yaml_space():
    yaml = 'sweep.space={model: "d2,d3", seed: "interval(5,6)", name: "a,b"}'
    fixed, space = read_space(["model=d4", "seed=interval(0,1)", yaml], [])
    assert fixed == ["model=d4", yaml]
    assert space == {"seed": Float(0.0, 1.0), "name": Choice(("a", "b"))}


def test_optuna_reads_the_journal_and_a_cut_line_is_dropped(tmp_path):
    path, space = tmp_path / "journal.log", {"a": Float(0.0, 1.0), "m": Choice(("d2", "d4"))}
    study = open_study(path, "maximize", "a")
    for job, (status, value) in enumerate((("done", 1.5), ("failed", None), ("pruned", 1.2)), start=1):
        trial = ask(study, space, SweepConfig())
        trial.report(1.1, 50)
        row = {"job": job, "settings": trial.params, "status": status}
        tell(study, trial, row if value is None else row | {"value": value})
    text = path.read_bytes()
    assert open_study(path, "maximize", "other settings").trials == []
    path.write_bytes(text)
    for found in (study, open_study(path, "maximize", "a")):
        assert [trial.state.name for trial in found.trials] == ["COMPLETE", "FAIL", "PRUNED"]
        assert found.direction.name == "MAXIMIZE"
        assert found.trials[2].intermediate_values == {50: 1.1}
    for cut in range(text.rfind(b"\n", 0, -1) + 1, len(text), 97):
        path.write_bytes(text[:cut])
        kept = open_study(path, "maximize", "a")
        assert [row["job"] for row in rows_of(kept)] == [1, 2]
        tell(kept, ask(kept, space, SweepConfig()), {"job": 3, "status": "done", "value": 1.0})
        assert [row["job"] for row in rows_of(open_study(path, "maximize", "a"))] == [1, 2, 3], cut


def test_search_prints_its_best_trial_and_command(tpe, tiny, say):
    outputs, text = tpe
    trials = journal(outputs)
    assert [state for _, state, *_ in trials] == ["COMPLETE"] * 4
    best = min(range(4), key=lambda number: trials[number][2])
    assert f"best trial: {best + 1} " in text
    command = re.search(r"^its command: mlxchat (.*)$", text, re.MULTILINE)
    assert command is not None
    assert say("plan", *shlex.split(command[1])).splitlines()[-1].startswith("3 steps: 3 done")
    assert "──" not in say(*tiny, *TPE, f"outputs={outputs}"), "nothing runs again"
    assert journal(outputs) == trials


@pytest.mark.parametrize(
    ("kind", "point"),
    [
        ("tpe", "search.ended:3"),
        *(
            pytest.param(kind, point, marks=pytest.mark.slow)
            for kind, point in (
                ("tpe", "train.iteration:2"), ("tpe", "search.told:4"), ("tpe", "publish.renamed:4"),
                ("halving", "search.told:2"), ("halving", "train.iteration:5"),
            )
        ),
    ],
)  # fmt: skip
def test_killed_search_ends_like_an_uninterrupted_one(kind, point, request, mlxchat, tiny, tmp_path, say):
    undisturbed, _ = request.getfixturevalue(kind)
    command = [*tiny, *{"tpe": TPE, "halving": HALVING}[kind], f"outputs={tmp_path}/outputs"]
    killed = mlxchat(*command, environ={"MLXCHAT_CRASH_AT": point})
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    say(*command)
    assert journal(tmp_path / "outputs") == journal(undisturbed)


def test_failed_trials_do_not_stop_the_search(outputs, tiny, say):
    settings = ["sweep=tpe", "sweep.trials=3", "tokenizer.vocab_size=choice(280,330,60000)", f"outputs={outputs}"]
    text = say(*tiny, *settings, "sweep.seed=8", "sweep.metric=tokenizer.bytes_per_token")
    rows = json.loads((outputs / "multirun" / "smoke-search" / "table.json").read_text())
    assert {(row["tokenizer.vocab_size"], row["status"]) for row in rows} == {
        ("280", "done"), ("330", "done"), ("60000", "failed"),
    }  # fmt: skip
    assert "tokenizer.vocab_size is 60000" in rows[-1]["error"]
    # More merges never give fewer bytes a token, so the largest vocabulary is the best one.
    assert re.search(r"^best trial: \d+ tokenizer.vocab_size=330: ", text, re.MULTILINE)
    assert "3 trials for the largest tokenizer.bytes_per_token" in text


def test_trials_outside_the_best_third_stop_at_a_rung(halving):
    trials = journal(halving[0])
    curves = [curve for *_, curve in trials]

    def at_rung(number: int, rung: int) -> float | None:
        return next((value for at, value in sorted(curves[number].items()) if at >= rung), None)

    def is_worse(number: int, rung: int) -> bool:
        reached = sorted(value for each in range(number + 1) if (value := at_rung(each, rung)) is not None)
        return at_rung(number, rung) not in (None, *reached[: max(1, len(reached) // 3)])

    assert {state for _, state, *_ in trials} == {"PRUNED", "COMPLETE"}
    for number, (_, state, _, curve) in enumerate(trials):
        worse = [at for at in sorted(curve) for rung in (1, 3, 9) if rung <= at and is_worse(number, rung)]
        assert (state == "PRUNED", max(curve)) == ((True, worse[0]) if worse else (False, 12))


def test_pruned_trial_resumes_when_run_alone(halving, tiny, say):
    outputs, _ = halving
    params, _, _, curve = next(trial for trial in journal(outputs) if trial[1] == "PRUNED")
    rate = params["optimizer.matrix_lr"]
    settings = [item for item in HALVING if not item.startswith(("sweep", "optimizer.matrix_lr"))]
    say(*tiny, *settings, f"optimizer.matrix_lr={rate}", "stage=pretrain", f"outputs={outputs}")
    manifests = [json.loads(path.read_text()) for path in (outputs / "store").glob("pretrain-*/manifest.json")]
    (made,) = (each for each in manifests if each["config"]["optimizer"]["matrix_lr"] == rate)
    assert made["attempts"][-1]["resumed_from"] == max(curve)
    assert [each["outcome"] for each in made["attempts"]] == ["interrupted", "done"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep=tpe"], "a search needs settings that vary"),
        (["sweep=tpe", "seed=tag(lag,interval(1,2))"], '(?s)tag "lag" is unknown, expected log.*Expected choice'),
        (["sweep=tpe", "seed=interval(2,1)"], "interval.2,1.: "),
        (["sweep=tpe", "optimizer.matrx_lr=interval(0,1)"], 'Did you mean "optimizer.matrix_lr"'),
        (["sweep=tpe", "seed=1,2", "sweep.metric=pretran.val_bpb"], 'Did you mean "pretrain.val_bpb"'),
        (["sweep=halving", "seed=1,2", "sweep.metric=pretrain.tokens_per_second"], "(?s)only at the end.*val_bpb"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_refused_before_anything_is_written(arguments, message, tmp_path, say):
    text = say(*arguments, f"outputs={tmp_path}/outputs", code=2)
    assert re.search(message, text), text
    assert not (tmp_path / "outputs").exists()


def test_missing_optuna_names_the_extra(tmp_path, monkeypatch, say):
    monkeypatch.setattr("mlxchat.sweep.search.find_spec", lambda name: None)
    assert "pip install 'mlxchat[search]'" in say("sweep=tpe", "seed=1,2", f"outputs={tmp_path}/outputs", code=2)
