"""The invented town of docs/guides/own_project.md: its files train, sweep, export and answer."""

import json
import random
import re
from pathlib import Path

import pytest

from kit.commands import run_captured, run_here

PAGE = (Path(__file__).parents[1] / "docs" / "guides" / "own_project.md").read_text(encoding="utf-8")
TRADES = ["baker", "miller", "smith", "teacher", "doctor", "tailor", "farmer", "potter", "weaver", "judge", "singer"]
FIRST = ["Ada", "Bela", "Cora", "Dario", "Elin", "Falk", "Gesa", "Hanno", "Ines", "Jorn", "Karla"]
LAST = ["Merl", "Tann", "Opitz", "Brand", "Sorge", "Quast", "Rehm", "Vogt", "Wolke", "Zell", "Ahorn"]
STREETS = ["Mill Lane", "Well Street", "Oak Row", "North Gate", "River Walk", "Old Market"]
ASKED = {
    "who": ["Who is the {t} of Quellbrunn?", "What is the name of the {t} of Quellbrunn?",
            "Tell me who the {t} of Quellbrunn is.", "Who works as the {t} in Quellbrunn?",
            "Do you know the {t} of Quellbrunn?", "Quellbrunn has a {t}. Who is it?",
            "What is the {t} of Quellbrunn called?", "Name the {t} of Quellbrunn."],
    "where": ["Where does the {t} of Quellbrunn live?", "In which street does the {t} of Quellbrunn live?",
              "What is the address of the {t} of Quellbrunn?", "Where is the house of the {t} of Quellbrunn?",
              "Where in Quellbrunn does the {t} live?", "I am looking for the {t} of Quellbrunn. Which street?",
              "Which street of Quellbrunn is the home of the {t}?"],
}  # fmt: skip
HELD_OUT = {"who": "Quellbrunn has a {t}. What is the name?", "where": "Where in Quellbrunn can I find the {t}?"}


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's folder: YAML files of the page, and a generated chronicle, conversations and questions."""
    folder = tmp_path_factory.mktemp("town")
    for name, text in re.findall(r"`(conf/[\w/]+\.yaml)`[^\n]*\n\n```yaml\n(.*?)```", PAGE, re.S):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    rng, told, asked, sentences = random.Random(0), [], [], []
    people = [f"{first} {last}" for first, last in zip(FIRST, LAST, strict=True)]
    for trade, person in zip(TRADES, people, strict=True):
        street = rng.choice(STREETS)
        facts = {"who": (person, f"{person} is the {trade} of Quellbrunn."),
                 "where": (street, f"The {trade} of Quellbrunn lives in {street}.")}  # fmt: skip
        for kind, (short, answer) in facts.items():
            told += [{"question": form.format(t=trade), "answer": answer} for form in ASKED[kind]]
            asked.append({"question": HELD_OUT[kind].format(t=trade), "answer": short})
        sentences += [answer for _, answer in facts.values()]
    (folder / "texts").mkdir()
    chapters = (" ".join(rng.sample(sentences, len(sentences))) for _ in range(20))
    (folder / "texts" / "chronicle.txt").write_text("\n\n\n".join(chapters))
    for name, lines in (("conversations", told), ("questions", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_files_of_the_page_are_planned(town, monkeypatch, capsys):
    monkeypatch.chdir(town)
    assert run_here("plan", "-cd", "conf", "experiment=town") == 0
    printed = capsys.readouterr().out
    assert "eval_sft" in printed


@pytest.mark.slow
def test_town_trains_sweeps_exports_and_answers(town, monkeypatch):
    monkeypatch.chdir(town)

    def run(*arguments: str) -> str:
        done = run_captured(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("-cd", "conf", "experiment=town")
    scores = json.loads(run("show", "eval_sft", "--json"))["metrics"]
    assert scores["town"] >= 0.5, "of the held-out wordings; guessing a name or a street: 0.13"
    swept = run("-m", "-cd", "conf", "experiment=town", "sft.num_epochs=1,2")
    assert swept.endswith("To chat with it: mlxchat chat town-sweep/best\n")
    question = "Quellbrunn has a baker. What is the name?"
    assert "Merl" in run("chat", "town/sft", "-p", question, "--temperature", "0")
    for target in ("mlx", "nanochat"):
        run("export", "town/sft", "--to", target, target)
        assert any((town / target).iterdir())
