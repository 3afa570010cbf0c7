"""mlxchat report: which report a name means, where it goes, and several runs beside each other."""

import json
import re

import pytest

from mlxchat.cli import dispatch
from mlxchat.errors import StoreError
from mlxchat.report.collect import collect
from mlxchat.report.comparison import comparison_charts


def tell(fake, *arguments):
    assert dispatch(["report", f"outputs={fake.root}", *map(str, arguments)]) == 0


@pytest.fixture
def two_runs(whole):
    """A second run in the same outputs, with another pretraining of another size."""
    second = whole.root / "runs" / "20261122-101502-000001-4242-larger"
    second.mkdir()
    plan = json.loads((whole.run / "plan.json").read_text())
    rid = "z" * 52
    for step in plan["steps"]:
        if step["step"] == "pretrain":
            step |= {"rid": rid, "artifact": f"pretrain-d6-{rid[:16]}"}
    (second / "plan.json").write_text(json.dumps(plan | {"run": second.name, "experiment": "larger"}))
    (second / "events.jsonl").write_text("")
    folder = whole.root / "store" / f"pretrain-d6-{rid[:16]}"
    folder.mkdir()
    manifest = json.loads((whole.folder("pretrain") / "manifest.json").read_text())
    manifest |= {"config": {"model": {"depth": 6}}, "derived": manifest["derived"] | {"total_flops": 9e15}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    lines = [{"iteration": i, "loss": 4.0, "val_bpb": 1.0} for i in range(1, 50)]
    whole.write_lines(folder / "metrics.jsonl", lines)
    derived = {**manifest["derived"], "total_flops": 1e15}
    whole.edit_json("pretrain", "manifest.json", config={"model": {"depth": 4}}, derived=derived)
    return whole


def test_latest_run_is_the_default(whole, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    tell(whole, "--open", "--cost-per-hour", "24")
    assert opened == [(whole.run / "report.html").resolve().as_uri()]
    assert "$" in (whole.run / "report.html").read_text()
    assert f"report: {whole.run / 'report.html'}" in capsys.readouterr().out
    assert (whole.run / "report.md").is_file()


@pytest.mark.parametrize("name", ["speedrun", "outputs/runs/20261121-101502-000001-4242-speedrun"])
def test_run_is_found_by_name_or_folder(whole, name, tmp_path):
    tell(whole, name, "--out", tmp_path / "there")
    assert (tmp_path / "there" / "report.html").is_file()
    assert (tmp_path / "there" / "report" / "pretrain-loss.svg").is_file()


def test_artifact_is_reported_with_its_lineage(whole, tmp_path, capsys):
    tell(whole, whole.artifact("eval_sft"), "--out", tmp_path / "there")
    words = (tmp_path / "there" / "report.md").read_text()
    assert "<summary>midtrain (MID)" in words
    assert "<summary>rl (RL)" not in words
    assert re.search(r"Metric +SFT", capsys.readouterr().out)


def test_unknown_name_is_refused(whole):
    with pytest.raises(StoreError, match=r'"nothing" is no artifact or run .*Runs: speedrun'):
        tell(whole, "nothing")


def test_runs_are_compared(two_runs, tmp_path):
    tell(two_runs, "speedrun", "larger", "--out", tmp_path / "there")
    words = (tmp_path / "there" / "report.md").read_text()
    assert "| speedrun | 4 |" in words
    assert "| larger | 6 |" in words
    assert (tmp_path / "there" / "report" / "scaling.svg").is_file()


def test_shared_steps_are_drawn_once(two_runs):
    reports = [collect(two_runs.root, folder) for folder in sorted((two_runs.root / "runs").iterdir())]
    charts = {chart.name: chart for chart in comparison_charts(reports, ["a", "b"])}
    assert [curve.label for curve in charts["pretrain-loss"].curves] == ["a", "b"]
    assert "sft-loss" not in charts


def test_sweep_is_reported(whole, tmp_path):
    plan = json.loads((whole.run / "plan.json").read_text())
    folder = whole.root / "multirun" / "20261121-1"
    folder.mkdir(parents=True)
    jobs = {
        str(n): {"overrides": [], "settings": {}, "title": f"model=d{2 * n}", "steps": plan["steps"]} for n in (1, 2)
    }
    (folder / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    tell(whole, "20261121-1")
    assert "| model=d4 |" in (folder / "report.md").read_text()
