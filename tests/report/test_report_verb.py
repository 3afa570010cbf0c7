"""mlxchat report: which report a name means, where it goes, and several runs beside each other."""

import json
import re

import pytest

from mlxchat.cli import dispatch


def tell(fake, *arguments):
    assert dispatch(["report", f"outputs={fake.root}", *map(str, arguments)]) == 0


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


def test_sweep_is_reported(whole):
    plan = json.loads((whole.run / "plan.json").read_text())
    folder = whole.root / "multirun" / "20261121-1"
    folder.mkdir(parents=True)
    jobs = {str(n): {"settings": {}, "title": f"model=d{2 * n}", "steps": plan["steps"]} for n in (1, 2)}
    (folder / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    tell(whole, "20261121-1")
    assert "| model=d4 |" in (folder / "report.md").read_text(), "while it runs"
    table = [{"job": n, "model": f"d{2 * n}", "eval.val_bpb": 1.25, "status": "done"} for n in (2, 1)]
    (folder / "table.json").write_text(json.dumps(table))
    tell(whole, "20261121-1")
    lines = (folder / "report.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| job | model | eval.val")]
    assert [line for line in lines if line.startswith("| 2 | d4 | 1.25 | done")]
