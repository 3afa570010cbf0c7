"""Users' stages, tasks, evaluations, trackers and groups: the example of docs/guides/own_parts.md."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kit.commands import run_process
from kit.docs import COMMANDS, write_files
from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import TrackerConfig
from mlxchat.errors import ConfigError, StepFailed
from mlxchat.evals.measure import measure_own
from mlxchat.pipeline import plan_of
from mlxchat.runner.keys import pin_externals
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.stage import read_stage
from mlxchat.store.store import Store
from mlxchat.tasks import load_item
from mlxchat.trackers import Results, Tracker

WORDS = ("--config-dir", "conf", "experiment=words")
OWN = ("my_stages", "doubles", "judging", "printing", "letters")


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's files in a folder, which is the current one."""
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith(OWN)]:
        del sys.modules[name]
    read_stage.cache_clear()


def plan(*overrides: str) -> dict[str, PlannedStep]:
    """Return the plan of the words pipeline as a new process makes it."""
    read_stage.cache_clear()
    config = compose_config(["experiment=words", *overrides], [str(Path("conf").resolve())]).config
    return {step.name: step for step in plan_of(config, Store(Path("outputs")))}


def test_own_stages_run_are_cached_and_rerun_by_their_changes(example, say):
    say(*WORDS)
    (made,) = (example / "outputs" / "store").glob("count-*/words.json")
    assert json.loads(made.read_text()) == [["a", 3], ["rose", 3]]
    assert "nothing to do: all 3 steps are done" in say(*WORDS)
    steps = plan("count.most=5")
    assert [step.state for step in steps.values()] == ["done", "done", "run"]
    assert steps["count"].reason == "config changed: count.most 2 → 5"
    before, after = plan(), plan("model.depth=8", "pretrain.eval_every=7", "tokenizer.vocab_size=999")
    assert [step.key for step in after.values()] == [step.key for step in before.values()], "no built-in section"
    letters = example / "my_stages" / "letters.py"
    letters.write_text("# Letters.\n" + letters.read_text().replace("lower", "upper"))
    assert plan()["clean"].reason == "code drift: my_stages/letters.py"
    (example / "poem.txt").write_text("Another one")
    assert plan()["download"].reason == "external data changed"


def test_own_settings_are_checked(example):
    for override, message in (
        ("count.mots=3", r'there is no "count.mots" to set. Did you mean "count.most"\?'),
        ("count.most=0", "count.most is 0, expected at least 1"),
        ("stages=[./my_stage]", r'stages: there is no folder ./my_stage. Did you mean "./my_stages"\?'),
    ):
        with pytest.raises(ConfigError, match=message):
            plan(override)


DATACLASS = "from dataclasses import dataclass\n@dataclass\n"
IMPORT = "from mlxchat.runner.stage import Stage\n"
STAGE = f"{IMPORT}stage = Stage(version=1, produces='x', outputs=[])\n"
WITH_SETTINGS = f"{IMPORT}stage = Stage(version=1, produces='x', outputs=[], settings=Settings)\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sft", STAGE, "two stages are called sft"),
        ("machine", f"{DATACLASS}class Settings:\n    x: int = 1\n{WITH_SETTINGS}", 'already has a section "machine"'),
        ("odd", "stage = 1\n", r"odd.py declares no stage; expected stage = Stage\("),
        ("odd", f"{DATACLASS}class Settings:\n    x: set = None\n{WITH_SETTINGS}", "no dataclass for YAML: .*x"),
    ],
)
def test_invalid_stage_file_is_refused(name, text, message, example):
    (example / "my_stages" / f"{name}.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        plan()


def test_package_provides_stages_and_groups(example):
    installed = (example / "package").rename(example / "site-packages")
    elsewhere = example / "elsewhere"
    elsewhere.mkdir()
    environ = {"PYTHONPATH": str(installed), "XDG_CACHE_HOME": str(example / "cache")}
    done = run_process("experiment=verse", cwd=elsewhere, environ=environ)
    assert done.returncode == 0, done.stderr
    (text,) = (elsewhere / "outputs" / "store").glob("rhyme-*/text.txt")
    assert text.read_text().startswith("A rose")


SUITE = ["suite=none", '+suite.doubles={task: "doubles:Doubles", split: test, size: 4}']


def test_own_task_is_an_item_of_a_suite(example):
    assert SUITE in [command[1:] for command in COMMANDS]
    config = compose_config(SUITE).config
    task = load_item(config.suite["doubles"])
    number = int(task[1]["messages"][0]["content"].split()[-1][:-1])
    assert (len(task), task.evaluate(task[1], f"{2 * number}")) == (4, True)
    before = pin_externals({"suite": config.suite})
    assert list(before) == ["code doubles.py"]
    (example / "doubles.py").write_text((example / "doubles.py").read_text().replace("1000", "2000"))
    assert pin_externals({"suite": config.suite}) != before
    with pytest.raises(ConfigError, match=r"suite\.doubles: doubles:Triples: .*has no attribute 'Triples'"):
        compose_config([each.replace("doubles:Doubles", "doubles:Triples") for each in SUITE])


def test_own_evaluation_is_recorded_under_its_name(example):
    (example / "letters.py").write_text("def three(engine): return engine.number + 1\n")
    engine: Any = SimpleNamespace(number=2)
    assert measure_own(engine, {"three": "letters:three"}) == {"three": 3.0}
    config = compose_config(["eval.own.three=letters:three"]).config
    assert list(pin_externals({"eval": config.eval})) == ["code letters.py"]
    (example / "judging.py").write_text("def none(engine): pass\n")
    with pytest.raises(StepFailed, match=r"eval\.own\.none: judging:none returned None, expected a finite number"):
        measure_own(engine, {"none": "judging:none"})


def test_own_tracker_gets_records_and_results(example):
    folder = example / "outputs" / "runs" / "one"
    folder.mkdir(parents=True)
    config = compose_config(["tracker.kind=printing:Printer"]).config.tracker
    tracker = Tracker(TrackerConfig(kind=config.kind, project="p", tags=[]), folder)
    tracker.log("pretrain", {"iteration": 3, "loss": 1.5})
    tracker.finish(Results(numbers={"pretrain": {"loss": 1.5}}))
    assert (example / "outputs" / "printed.txt").read_text() == "pretrain 3 ['loss']\nfinished ['pretrain']\n"


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
