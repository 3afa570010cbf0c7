"""The journal of a search: identity of searches, and crashes while writing."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from optuna.distributions import CategoricalDistribution, FloatDistribution

from mlxchat.errors import ConfigError, StoreError
from mlxchat.sweep.search import Trials, ask

DEFINITION = {"metric": "pretrain.val_bpb", "space": {"a": "float 0..1"}, "fixed": {"seed": 1, "b": 2.5}}
SPACE: Any = {"a": FloatDistribution(0.0, 1.0), "m": CategoricalDistribution(("d2", "d4"))}


def row(job: int, status: str, **values: Any) -> dict[str, Any]:
    return {"job": job, "overrides": values, "status": status, "metrics": {}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal of three trials: done, failed, pruned."""
    trials = Trials(tmp_path / "journal.log", "maximize")
    trials.begin(DEFINITION)
    trials.add(SPACE, row(1, "done", a=0.1, m="d2"), 1.5)
    trials.add(SPACE, row(2, "failed", a=0.2, m="d4"), None)
    asked = ask(SPACE, trials.study.trials, number=3, seed=0, random_trials=1, direction="maximize")
    asked.report(1.1, 50)
    asked.report(1.2, 150)
    trials.add(SPACE, row(3, "pruned", a=1e-7, m="d2"), 1.2, asked)
    return trials.path


def test_optuna_reads_the_journal(path):
    study = Trials(path).study
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "PRUNED"]
    assert study.direction.name == "MAXIMIZE"
    assert study.best_trial.params == {"a": 0.1, "m": "d2"}
    assert study.trials[2].intermediate_values == {50: 1.1, 150: 1.2}
    assert [each["job"] for each in Trials(path).rows()] == [1, 2, 3]


def test_truncated_journal_resumes_from_its_last_whole_line(path):
    text = path.read_bytes()
    for cut in range(text.rfind(b"\n", 0, -1), len(text), 3):
        path.write_bytes(text[:cut])
        kept = Trials(path)
        count = len(kept.rows())
        assert count in (1, 2)
        kept.add(SPACE, row(count + 1, "done", a=0.5, m="d2"), 1.0)
        assert [each["job"] for each in Trials(path).rows()] == list(range(1, count + 2)), cut


@pytest.mark.parametrize("damage", [b"not json", b"{}", b"[]"])
def test_damaged_journal_line_is_refused(path, damage):
    lines = path.read_bytes().splitlines()
    lines[2] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(StoreError, match="is damaged"):
        Trials(path)


def test_different_search_is_refused_with_differences(path):
    with pytest.raises(ConfigError) as caught:
        Trials(path).begin({**DEFINITION, "space": {"a": "float 0..2"}, "fixed": {"seed": 1, "b": 3}})
    assert "fixed.b: 2.5 → 3" in str(caught.value)
    assert "space.a: float 0..1 → float 0..2" in str(caught.value)
    assert "seed" not in str(caught.value)
    assert "sweep.name=NAME" in str(caught.value)
