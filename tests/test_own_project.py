"""The files of docs/guides/own_project.md are composed and planned with data of the described forms."""

import json
import re
from pathlib import Path

PAGE = (Path(__file__).parents[1] / "docs" / "guides" / "own_project.md").read_text(encoding="utf-8")


def test_files_of_the_page_are_planned(tmp_path, say, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in re.findall(r"`(conf/[\w/]+\.yaml)`[^\n]*\n\n```yaml\n(.*?)```", PAGE, re.S):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    Path("texts").mkdir()
    Path("texts/chronicle.txt").write_text("Ada Merl is the baker of Quellbrunn.\n\n\nShe lives in Mill Lane.")
    asked = json.dumps({"question": "Who is the baker of Quellbrunn?", "answer": "Ada Merl"})
    for name in ("conversations", "questions"):
        Path(f"{name}.jsonl").write_text(f"{asked}\n" * 20)
    assert "eval_sft" in say("plan", "-cd", "conf", "experiment=town")
