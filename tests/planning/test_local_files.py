"""Faults in local files are found by `plan` and before a run begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxchat.cli import main

GOOD = {"question": "How many?", "answer": "Two."}


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    """A file of conversations, of whose lines the second and the fourth are broken."""
    path = tmp_path / "mine.jsonl"
    good = json.dumps(GOOD)
    path.write_text(f'{good}\n{{"question": 1, "answer": "x"}}\n{good}\nnot json\n')
    return path


@pytest.mark.parametrize("verb", [["plan"], [], ["-m", "seed=1,2"]], ids=["plan", "run", "sweep"])
def test_broken_lines_are_found_before_anything_is_computed(
    verb: list[str], conversations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: a broken .jsonl for SFT was found after pretraining and midtraining."""
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "good"}\n{"words": "bad"}\n')
    settings = [f"+sft.mixture.mine={{task: jsonl, path: {conversations}}}", "corpus=files", f"corpus.paths=[{text}]"]
    with pytest.raises(SystemExit) as caught:
        main([*verb, "experiment=smoke", *settings, f"outputs={tmp_path}/outputs"])
    output = capsys.readouterr()
    assert caught.value.code == 2
    assert f"sft.mixture.mine: {conversations} has 2 lines that are not conversations" in output.err
    assert "line 2: question and answer must be text" in output.err
    assert "line 4: not JSON" in output.err
    assert f'{text}: lines 2 are not JSON objects with a field "text"' in output.err
    assert output.err.count(str(text)) == 1
    assert not (tmp_path / "outputs").exists()


def test_a_mended_file_is_read_again(conversations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "experiment=smoke", f"+sft.mixture.mine={{task: jsonl, path: {conversations}}}"]
    command += [f"outputs={tmp_path}/outputs"]
    for code, lines in ((2, None), (0, [GOOD] * 40)):
        if lines:
            conversations.write_text(
                "".join(json.dumps({**line, "question": str(n)}) + "\n" for n, line in enumerate(lines))
            )
        with pytest.raises(SystemExit) as caught:
            main(command)
        assert caught.value.code == code, capsys.readouterr().err


def test_files_of_other_stages_are_not_read(conversations: Path, tmp_path: Path) -> None:
    item = f"+sft.mixture.mine={{task: jsonl, path: {conversations}}}"
    with pytest.raises(SystemExit) as caught:
        main(["plan", "experiment=smoke", "stage=pretrain", item, f"outputs={tmp_path}/outputs"])
    assert caught.value.code == 0
