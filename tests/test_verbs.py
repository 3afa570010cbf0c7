"""Verbs that read a store: output for people and for programs; examples of evaluations and of RL."""

import csv
import fcntl
import io
import json
import re
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.commands import Say, run_here
from kit.toys import PIPELINE
from mlxchat.commands.completion import complete_for_shell
from mlxchat.commands.evaluate import show_examples
from mlxchat.composition.compose import group_options
from mlxchat.config.verbs import VERBS
from mlxchat.errors import ConfigError
from mlxchat.evals.examples import write_examples
from mlxchat.store.files import Records
from mlxchat.store.locks import start_attempt
from mlxchat.store.naming import resolve


@pytest.fixture
def say(say: Say, toys: Any) -> Say:
    return lambda *arguments, **options: say(*arguments, f"outputs={toys.outputs}", **options)


@pytest.fixture
def two(toys: Any) -> Any:
    """Two runs with another setting of the first step; the stage says its number as a metric."""
    toys.add(
        "make",
        """
        (ctx.out / 'result.txt').write_text(str(ctx.config.toy.number))
        ctx.metrics['score'] = ctx.config.toy.number / 4
        """,
    )
    for number in (2, 3):
        toys.config.toy.number = number
        run = toys.run(toys.plan(PIPELINE))
        steps = [{"step": step.name, "key": step.key, "rid": ""} for step in toys.plan(PIPELINE)]
        record = {"started": "2026-01-01T00:00:00+00:00", "steps": steps}
        (run.folder / "plan.json").write_text(json.dumps(record))
    return toys


def test_diff_shows_config_inputs_metrics_and_contents(two, say):
    text = say("diff", "run1/first", "run2/first")
    assert re.search(r"^config\n  toy\.number  2 → 3$", text, re.MULTILINE)
    assert "  score  0.5 → 0.75  (+50.0%)" in text
    record = json.loads(say("diff", "run1/second", "run2/second", "--json"))
    assert (record["config"], set(record["inputs"]), set(record["contents"])) == ({}, {"source"}, {"result.txt"})


def test_diff_of_runs_compares_all_steps(two, say):
    (two.outputs / "refs" / "run2" / "second").unlink()
    text = say("diff", "run1", "run2")
    assert "toy.number  2 → 3" in text.partition("── second")[0]
    assert text.endswith("── second\nonly in a\n")


def test_lineage_and_show_as_text_and_json(two, say):
    first, second = resolve(two.store, "run2/first").name, resolve(two.store, "run2/second")
    assert say("lineage", "second") == (
        f"made from\n  {second.name}  [second]\n  └─ source: {first}  [first]\nused by\n  {second.name}  [second]\n"
    )
    record = json.loads(say("lineage", "first", "--json"))
    assert [node["artifact"] for node in record["uses"]["uses"]] == [second.name]
    text = say("show", "second")
    assert text.splitlines()[0] == second.name
    assert re.search(r"^  named +latest/second, run2/second$", text, re.MULTILINE)
    assert (
        json.loads(say("show", "second", "--json")).items()
        <= json.loads((second / "manifest.json").read_text()).items()
    )


def test_verify_finds_changed_missing_and_extra_files_and_lacking_inputs(two, say):
    assert "0 differ, 0 lack inputs" in say("verify")
    first, second = resolve(two.store, "first"), resolve(two.store, "second")
    (first / "result.txt").write_text("2")
    (second / "result.txt").unlink()
    (second / "other.txt").touch()
    text = say("verify", code=1)
    assert f"{first.name}  result.txt has other contents" in text
    assert f"{second.name}  result.txt is missing" in text
    assert f"{second.name}  other.txt is not listed in its manifest" in text
    assert list(json.loads(say("verify", "second", "--json", code=1))["faults"]) == [second.name]
    assert say("verify", "run1/first").startswith("1 artifact hashed")
    shutil.rmtree(resolve(two.store, "run1/first"))
    assert set(json.loads(say("verify", "--json", code=1))["absent"]) == {resolve(two.store, "run1/second").name}


def test_pins_are_created_listed_used_and_removed(two, say):
    assert say("pin").startswith("no pins")
    say("pin", "run1/first", "best")
    assert say("pin") == f"best  {resolve(two.store, 'run1/first').name}\n"
    assert say("show", "best").splitlines()[0] == resolve(two.store, "run1/first").name
    assert 'Did you mean "best"?' in say("pin", "--remove", "bst", code=2)
    assert "is not a pin name" in say("pin", "first", "../x", code=2)
    say("pin", "--remove", "best")
    assert say("pin").startswith("no pins")


def test_compare_shows_differences(two, say):
    lines = [line.split() for line in say("compare", "--sort=-score").splitlines()]
    assert lines == [["run2", "run1"], ["toy.number", "3", "2"], ["first.score", "0.75", "0.5"]]
    rows = list(csv.DictReader(io.StringIO(say("compare", "--format", "csv", "--sort", "toy.number"))))
    assert [row["first.score"] for row in rows] == ["0.5", "0.75"]
    assert "no run or sweep" in say("compare", "run7", code=2)


def test_compare_accepts_sweeps(two, say):
    sweep = two.outputs / "multirun" / "sweep1"
    sweep.mkdir(parents=True)
    steps = json.loads((two.outputs / "runs" / "run2" / "plan.json").read_text())["steps"]
    jobs = {"1": {"title": "toy.number=3", "steps": steps}, "2": {"title": "toy.number=9", "steps": []}}
    (sweep / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    both = json.loads(say("compare", "run1", "sweep1", "--format", "json"))
    assert [row["name"] for row in both] == ["run1", "toy.number=3"]


def test_gc_and_rm_remove_only_with_apply(two, say):
    first, second = resolve(two.store, "run1/first").name, resolve(two.store, "run1/second").name
    text = say("rm", "run1")
    for name in (first, second):
        assert re.search(rf"^  store/{name} +\d+ B  nothing needs it$", text, re.MULTILINE)
    assert text.endswith("add --apply to remove it\n")
    assert "not a run" in say("rm", "run1/first", code=2)
    for number in (1, 2):
        (two.outputs / "refs" / f"run{number}").rename(two.outputs / "refs" / f"2026010{number}-000000-1-toy")
    assert say("gc", "--keep-last", "1").endswith("add --apply to remove it\n")
    assert len(list((two.outputs / "store").iterdir())) == 4
    record = json.loads(say("gc", "--keep-last", "1", "--apply", "--json"))
    assert {item["kind"] for item in record["garbage"]} >= {"artifact", "ref"}
    assert len(list((two.outputs / "store").iterdir())) == len(record["kept"]) == 2


def test_samples_shows_running_trainings(toys, say):
    key = "a" * 52
    toys.store.prepare()
    start_attempt(toys.store.work(key), "run9", "first")
    samples = Records(toys.store.work(key) / "ckpt" / "records" / "samples.jsonl")
    for iteration in (10, 20):
        samples.append({"iteration": iteration, "prompt": "Once", "text": "\x1b[2Jupon"})
    with toys.store.lock(key).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        text = say("show", "first", "--samples")
    assert text.startswith("first, in progress")
    assert text.endswith("\n\nOnce\n  10       \\x1b[2Jupon\n  20       \\x1b[2Jupon\n")


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], set[str]]:
    """Return what the last word of a command line may become, as the shell's script gets it."""

    def run(line: str) -> set[str]:
        answer = io.StringIO()
        monkeypatch.setenv("_ARGCOMPLETE", "1")
        monkeypatch.setenv("_ARGCOMPLETE_IFS", "\n")
        monkeypatch.setenv("_ARGCOMPLETE_SUPPRESS_SPACE", "1")
        monkeypatch.setenv("COMP_LINE", line)
        monkeypatch.setenv("COMP_POINT", str(len(line)))
        with pytest.raises(SystemExit, match="0"):
            complete_for_shell(answer)
        return set(answer.getvalue().split("\n")) - {""}

    return run


def test_completion_covers_verbs_options_keys_and_artifacts(two, complete, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = f"outputs={two.outputs}"
    assert complete("mlxchat ") >= {verb for verb in VERBS if " " not in verb}
    assert complete("mlxchat lin") == {"lineage"}
    assert complete("mlxchat optimizer=") == {f"optimizer={name}" for name in group_options("optimizer")}
    assert "sft.batch.tokens=" in complete("mlxchat run sft.batch.")
    assert complete("mlxchat gc --k") == {"--keep-last"}
    assert complete(f"mlxchat show --json {place} fir") == {"first"}
    rid = resolve(two.store, "first").name[-16:]
    assert complete(f"mlxchat show {place} {rid[:6]}") == {rid}
    assert complete(f"mlxchat diff {place} run2/s") == {"run2/second"}
    assert complete("mlxchat -m executor=s") == {"executor=slurm", "executor=submitit_local"}
    assert complete("mlxchat data fetch --dr") == {"--dry-run"}


def test_completion_script_is_valid(capsys, tmp_path):
    assert run_here("completion", "bash") == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    assert "_ARGCOMPLETE" in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)


def shown(capsys: pytest.CaptureFixture[str], folder: Path, **options: Any) -> str:
    chosen = {"examples": "all", "n": 5, "task": None, "iteration": None} | options
    assert show_examples(folder, Namespace(**chosen)) == 0
    return capsys.readouterr().out


def example(task: str, index: int, *, verdict: bool, **changes: Any) -> dict[str, Any]:
    return {
        "task": task, "index": index, "seed": None, "prompt": f"question {index}", "output": f"said {index}",
        "expected": f"wanted {index}", "verdict": verdict, "tokens": 3, "details": {}, **changes,
    }  # fmt: skip


def test_examples_are_spread_over_tasks(capsys, tmp_path):
    rows = [example("gsm8k", index, verdict=index % 2 == 0) for index in range(10)]
    rows += [example("mmlu", index, verdict=True) for index in range(4)]
    write_examples(tmp_path / "examples.parquet", rows)
    lines = [line for line in shown(capsys, tmp_path, examples="right", n=4).splitlines() if "3 tokens" in line]
    assert [line.split("  ")[0] for line in lines] == ["gsm8k 0", "gsm8k 2", "mmlu 0", "mmlu 1"]
    assert "gsm8k: 5 of 10 right" in shown(capsys, tmp_path, task="gsm8k")
    with pytest.raises(ConfigError, match='Did you mean "gsm8k"'):
        shown(capsys, tmp_path, task="gsm8")


def test_rollouts_show_rewards_best_answers_first(capsys, tmp_path):
    answers = [
        {
            "iteration": iteration, "question": 5, "sample": sample, "prompt": "<|bos|>what?", "output": f"it {sample}",
            "expected": "it is 1", "reward": float(sample), "parts": {"brief": -0.25}, "right": sample == 1,
            "advantage": sample - 0.5, "tokens": 3, "finished": True,
        }
        for iteration in (1, 9) for sample in (0, 1)
    ]  # fmt: skip
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in answers))
    text = shown(capsys, tmp_path, iteration=9)
    assert "iteration 9, question 5: 1 of 2 right, mean reward 0.5" in text
    best, worst = text.index("right  reward 1  brief -0.25  advantage +0.500"), text.index("wrong  reward 0  brief")
    assert best < worst
    assert "iteration 1," not in text
    assert "<|bos|>" not in text
