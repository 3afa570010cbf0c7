"""Faults in local files are found by `plan` and before a run begins."""

import json
from pathlib import Path

import pytest

from kit.commands import run_here

GOOD = {"question": "How many?", "answer": "Two."}


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    """A file of conversations, of whose lines the second and the fourth are broken."""
    path = tmp_path / "mine.jsonl"
    good = json.dumps(GOOD)
    path.write_text(f'{good}\n{{"question": 1, "answer": "x"}}\n{good}\nnot json\n')
    return path


@pytest.mark.parametrize("verb", [[], ["-m", "seed=1,2"]], ids=["run", "sweep"])
def test_broken_lines_are_found_before_anything_is_computed(verb, conversations, tmp_path, capsys):
    """Bug: a broken .jsonl for SFT was found after pretraining and midtraining."""
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "good"}\n{"words": "bad"}\n')
    settings = [f"+sft.mixture.mine={{task: jsonl, path: {conversations}}}", "corpus=files", f"corpus.paths=[{text}]"]
    assert run_here(*verb, "experiment=smoke", *settings, f"outputs={tmp_path}/outputs") == 2
    printed = capsys.readouterr().err
    for line in (
        f"sft.mixture.mine: {conversations} has 2 lines that are not conversations",
        "line 2: question and answer must be text", "line 4: not JSON",
        f'{text}: line 2 is not a JSON object with a field "text"',
    ):  # fmt: skip
        assert line in printed
    assert printed.count(str(text)) == 1
    assert not (tmp_path / "outputs").exists()


def test_files_are_read_for_their_stages_only_and_again_once_changed(conversations, tmp_path):
    item = f"+sft.mixture.mine={{task: jsonl, path: {conversations}}}"
    command = ("plan", "experiment=smoke", item, f"outputs={tmp_path}/outputs")
    assert run_here(*command, "stage=pretrain") == 0
    assert run_here(*command) == 2
    lines = (json.dumps({**GOOD, "question": str(number)}) for number in range(40))
    conversations.write_text("".join(f"{line}\n" for line in lines))
    assert run_here(*command) == 0


def test_own_conversations_are_all_trained_on(tmp_path, capsys):
    """Bug: a tenth of a user's file was held out without a word."""
    path = tmp_path / "town.jsonl"
    path.write_text("".join(json.dumps({**GOOD, "question": str(number)}) + "\n" for number in range(60)))
    item = f"+sft.mixture.mine={{task: jsonl, path: {path}}}"
    command = ("plan", "stage=sft", "experiment=smoke", f"outputs={tmp_path}/outputs")
    assert run_here(*command, item) == 0
    assert f"sft.mixture.mine: {path} has 60 conversations, 0 held out\n" in capsys.readouterr().out
    suite = f"+sft.validation.mine={{task: jsonl, path: {path}, split: test}}"
    assert run_here(*command, item, suite) == 2
    assert "none of its conversations is in the test split" in capsys.readouterr().err
    held = ", options: {held_out_frac: 0.2}}"
    assert run_here(*command, item.replace("}", held), suite.replace("}", held)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if str(path) in line]
    assert lines == [f"{line.split(':')[0]}: {path} has 60 conversations, 15 held out" for line in lines]
    assert len(lines) == 2
