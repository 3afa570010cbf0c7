"""The command line: verbs, help, exit codes, and what each imports."""

import json
import re
from pathlib import Path

import pytest

from kit.models import composed
from mlxchat.cli import main
from mlxchat.commands.arguments import parser_of
from mlxchat.composition.compose import group_names, group_options
from mlxchat.config.verbs import VERBS
from mlxchat.errors import ConfigError, Interrupted, StepFailed
from mlxchat.store.files import Records
from mlxchat.store.manifest import read_manifest

STEPS = ["corpus", "tokenizer", "pretrain", "midtrain", "sft", "rl", "eval_base", "eval_mid", "eval_sft", "eval_rl"]


def states(text: str) -> dict[str, str]:
    """Return step → done or run of a printed plan."""
    return {line.split()[0]: line.split()[1] for line in text.splitlines() if line.split()[0] in STEPS}


def test_help_lists_verbs_and_groups_with_options(say):
    text = say("--help")
    assert say("-h") == say("help") == text
    for verb, purpose in ((verb, purpose) for verb, (_, purpose) in VERBS.items() if " " not in verb):
        assert re.search(rf"^  {verb} +{re.escape(purpose)}$", text, re.MULTILINE)
    unfolded = re.sub(r"\n {17}", " ", text)
    lines = {line.split()[0]: line.split()[1:] for line in unfolded.splitlines() if line.startswith("  ")}
    for group in set(group_names()) - {"settings", "mixture", "model"}:
        assert set(lines[f"{group}="]) == set(group_options(group))
    assert "mixture@sft.mixture=" in text, "a mixture is chosen at the place it is for"
    assert max(len(line) for line in text.splitlines()) <= 120


def test_every_verb_has_help_and_refuses_unused_arguments(say):
    needed = {
        "distill": ["a.txt", "--teacher", "http://127.0.0.1:9/v1", "--out", "answers.jsonl"],
        "import": ["hf", "b"],
        "export": ["a", "b", "--to", "hf"],
    }
    for verb in VERBS:
        text = say(*verb.split(), "--help")
        assert f"mlxchat {verb}" in text or verb == "run"
        assert len(text.splitlines()) >= 3
        if verb.startswith(("run", "plan", "eval", "bench", "completion", "data")):
            continue
        words = needed.get(verb, ["a"] * parser_of(verb).least)
        assert '"model=d4" is not used here' in say(verb, *words, "model=d4", code=2)
        told = say(verb, *words, "--qq", code=2)
        assert re.fullmatch(
            rf"error: unrecognized arguments: --qq\.( Did you mean \S+)? See: mlxchat {verb} --help\n", told
        )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("ls --jsn", 'unrecognized arguments: --jsn. Did you mean "--json"? See: mlxchat ls --help'),
        ("data fetc", 'Did you mean "fetch"?'),
        ("seed=1 paln", 'Did you mean "plan"?'),
    ],
)
def test_misspelt_word_gets_a_suggestion(words, told, say):
    assert told in say(*words.split(), code=2)


def test_missing_outputs_folder_is_reported_and_not_created(say, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, code, told in (
        ("status", 0, "{outputs} holds no runs"),
        ("ls", 0, "{outputs} holds no artifacts"),
        ("chat -p hi", 2, "error: {outputs} holds no models"),
    ):
        printed = say(*words.split(), "outputs=none", code=code)
        assert printed.startswith(f"{told.format(outputs=tmp_path / 'none')} yet: `mlxchat` makes some")
        assert not (tmp_path / "none").exists()


def test_unwritable_outputs_folder_is_refused(say, tmp_path):
    (tmp_path / "file").touch()
    text = say("experiment=smoke", f"outputs={tmp_path}/file", code=2)
    assert "starts" not in text
    assert re.search(rf"^error: outputs folder {tmp_path}/file cannot be written .*outputs=PATH.*\n$", text, re.M)


def test_status_names_finished_and_unfinished_steps(finished, outputs, say):
    text = say("status", f"outputs={finished.outputs}")
    assert {line.split()[0] for line in text.splitlines()[1:]} == set(STEPS)
    assert "not done" not in text
    work = outputs / "work" / ("a" * 52)
    Records(work / "attempts.jsonl").append(
        {"attempt": 1, "started": "2026-01-01T00:00:00+00:00", "step": "pretrain", "run": "r", "pid": 1, "host": "h"}
    )
    Records(work / "ckpt" / "records" / "metrics.jsonl").append({"iteration": 7})
    (line,) = (line for line in say("status", f"outputs={outputs}").splitlines() if "killed" in line)
    assert re.fullmatch(r"  pretrain +killed at iteration 7", line)


def test_ls_lists_artifacts_newest_last_and_counts_encoded_text(finished, say):
    text = say("ls", f"outputs={finished.outputs}")
    *lines, last = text.splitlines()
    folders = {path.name for path in (finished.outputs / "store").iterdir()}
    encoded = {name for name in folders if name.startswith("tokens-")}
    assert {line.split()[2] for line in lines} == folders - encoded
    assert sorted(line[:16] for line in lines) == [line[:16] for line in lines]
    assert re.match(rf"and {len(encoded)} folders of encoded text, tokens-\* \(\d[\d.]* [kM]?B\)", last)


def test_graph_has_every_step_and_marks_done_ones(finished, tiny, say):
    text = say("plan", "--graph", "ascii", *tiny, f"outputs={finished.outputs}")
    assert sorted(re.findall(r"(\w+) \[done\]", text)) == sorted(STEPS)
    assert text.startswith("corpus [done]\n")
    text = say("plan", "--graph", "mermaid", *tiny, f"outputs={finished.outputs}", "rl.temperature=0.9")
    assert text.startswith("flowchart LR\n")
    edges = set(re.findall(r"^  (\w+) --> (\w+)$", text, re.MULTILINE))
    pipeline = composed("experiment=smoke").pipeline.items()
    assert edges == {(each[role], step) for step, each in pipeline for role in each if role != "stage"}
    assert set(re.findall(r"(\w+)\[\w+\]:::done", text)) == set(STEPS) - {"rl", "eval_rl"}


def test_plan_writes_nothing(tiny, say, tmp_path):
    short = [*tiny, "stage=corpus", "corpus.validation_documents=5", f"outputs={tmp_path}/outputs"]
    pending = json.loads(say("plan", *short, "--json"))
    assert not (tmp_path / "outputs").exists(), "planning writes nothing there"
    say(*short)
    shown = json.loads(say("plan", *short, "--json"))
    (planned,), (step,) = pending["steps"], shown["steps"]
    assert (step["state"], step["key"]) == ("done", planned["key"])


def test_plan_starts_with_downloads_and_duration(tmp_path, say, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path / "cache" / "mlxchat"))
    settings = ["model=d4", "stage=pretrain", "machine.training_flops=1e13", f"outputs={tmp_path}/outputs"]
    head, recipe, offline, *steps = say("plan", *settings).splitlines()
    # 6 × 19,922,944 weights + 12 × 4 layers × 256 × 2,048 FLOPs a token, 734,003,200 tokens, at 1e13 a second.
    assert head == (
        "downloads: karpathy/fineweb-edu-100b-shuffle (size unknown), eval_bundle.zip (size unknown). "
        "Pretraining on this machine: about 2h57m (predicted)"
    )
    assert recipe.startswith("recipe: experiment=nanochat, implied by model=")
    assert "corpus=bundled" in offline
    assert steps[0].startswith("corpus ")
    quiet = say("plan", "experiment=quickstart", *settings).splitlines()
    assert quiet[0].startswith("corpus "), "nothing is downloaded"


def test_second_run_does_nothing(outputs, tiny, say):
    def files() -> dict[Path, int]:
        found = (path for path in outputs.rglob("*") if not path.is_dir() and path.parent.name != "locks")
        return {path: path.lstat().st_mtime_ns for path in found}

    before = files()
    text = say(*tiny, f"outputs={outputs}")
    assert set(states(text).values()) == {"done"}
    assert text.splitlines()[-1].startswith("nothing to do: all 10 steps are done")
    assert files() == before


def test_default_verb_is_run(finished, tiny):
    lines = finished.stdout.splitlines()
    assert "10 steps: 0 done, 10 to run" in lines
    assert [line.split()[0] for line in lines if re.match(r"\w+ +done in ", line)] == STEPS
    assert "Warning" not in finished.stderr
    for place in (finished.outputs / "store").iterdir():
        assert read_manifest(place)["argv"] == ["mlxchat", *tiny, f"outputs={finished.outputs}"]


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ConfigError("one\ntwo"), 2, "error: one\n       two\n"),
        (StepFailed("x"), 1, "error: x\n"),
        (Interrupted("pretrain stopped: saved at 82.", 2), 130, "pretrain stopped: saved at 82.\n"),
    ],
    ids=repr,
)
def test_exit_code_and_message_depend_on_the_error(error, code, told, monkeypatch, capsys):
    def fail(options: object) -> int:
        raise error

    monkeypatch.setattr("mlxchat.commands.inspect._status", fail)
    with pytest.raises(SystemExit) as caught:
        main(["status"])
    assert (caught.value.code, capsys.readouterr().err) == (code, told)
