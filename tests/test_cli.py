"""The command line: every verb, in a new process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kit.commands import CommandLine
from mlxchat import __version__
from mlxchat.cli import main
from mlxchat.commands.arguments import parser_of
from mlxchat.composition.compose import group_names, group_options
from mlxchat.config.verbs import VERBS
from mlxchat.errors import ConfigError, DataError, Interrupted, StepFailed, StoreError
from mlxchat.store.files import Records
from mlxchat.store.manifest import read_manifest

STEPS = ["corpus", "tokenizer", "pretrain", "midtrain", "sft", "rl", "eval_base", "eval_mid", "eval_sft", "eval_rl"]


def states(text: str) -> dict[str, str]:
    """Return step → done or run of a printed plan."""
    return {line.split()[0]: line.split()[1] for line in text.splitlines() if line.split()[0] in STEPS}


def test_version_is_one_line(say: Any) -> None:
    assert say("--version") == f"mlxchat {__version__}\n"


@pytest.mark.parametrize("option", ["--help", "-h", "help"])
def test_help_lists_verbs_and_groups_with_options(option: str, say: Any) -> None:
    text = say(option)
    for verb, purpose in ((verb, purpose) for verb, (_, purpose) in VERBS.items() if " " not in verb):
        assert re.search(rf"^  {verb} +{re.escape(purpose)}$", text, re.MULTILINE)
    unfolded = re.sub(r"\n {17}", " ", text)
    lines = {line.split()[0]: line.split()[1:] for line in unfolded.splitlines() if line.startswith("  ")}
    for group in set(group_names()) - {"settings", "mixture", "model"}:
        assert set(lines[f"{group}="]) == set(group_options(group))
    assert "mixture@sft.mixture=" in text, "a mixture is chosen at the place it is for"
    assert "Powered by Hydra" not in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_help_abbreviates_the_models(say: Any) -> None:
    (line,) = (line for line in say("--help").splitlines() if line.startswith("  model="))
    _, first, _, last = line.split()
    assert set(group_options("model")) == {f"d{depth}" for depth in range(int(first[1:]), int(last[1:]) + 1)}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, say: Any) -> None:
    text = say(*verb.split(), "--help")
    assert f"mlxchat {verb}" in text or verb == "run"
    assert len(text.splitlines()) >= 3


@pytest.mark.parametrize(
    "verb",
    [
        verb
        for verb in VERBS
        if not verb.startswith(("run", "plan", "explain", "graph", "eval", "bench", "completion", "data"))
    ],
)
def test_verbs_refuse_unused_arguments(verb: str, say: Any) -> None:
    needed = {
        "distill": ["a.txt", "--teacher", "http://127.0.0.1:9/v1", "--out", "answers.jsonl"],
        "import": ["hf", "b"],
    }
    words = needed.get(verb, ["a"] * parser_of(verb).least)
    assert '"model=d4" is not used here' in say(verb, *words, "model=d4", code=2)
    told = say(verb, *words, "--qq", code=2)
    assert re.fullmatch(
        rf"error: unrecognized arguments: --qq\.( Did you mean \S+)? See: mlxchat {verb} --help\n", told
    )


def test_misspelt_option_gets_a_suggestion(say: Any) -> None:
    assert 'unrecognized arguments: --jsn. Did you mean "--json"? See: mlxchat ls --help' in say("ls", "--jsn", code=2)
    assert 'Did you mean "--multirun"?' in say("--multirn", "seed=1,2", code=2)
    assert 'Did you mean "fetch"?' in say("data", "fetc", code=2)
    assert 'there is no verb "lineag"' in say("lineag", "x", code=2)


def test_cfg_prints_the_composed_configuration(say: Any) -> None:
    text = say("--cfg", "job", "sft.num_epochs=3")
    assert text.startswith("name: quickstart\nseed: 42\n")
    assert "\n  num_epochs: 3\n" in text
    assert say("--cfg", "job", "-p", "sft.batch", "sft.batch.tokens=1024") == (
        "# @package sft.batch\ntokens: 1024\nrow_tokens: ${model.context_tokens}\n"
    )


def test_config_dir_adds_options(say: Any, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [d4, _self_]\nname: mine\ndepth: 6\n")
    text = say(
        "plan", "experiment=quickstart", "model=mine", "--config-dir", str(tmp_path), f"outputs={tmp_path}/outputs"
    )
    assert "pretrain-mine (key " in text


@pytest.mark.parametrize("verb", ["status", "ls"])
def test_missing_outputs_folder_is_reported_and_not_created(verb: str, say: Any, tmp_path: Path) -> None:
    text = say(verb, f"outputs={tmp_path}/none")
    assert re.fullmatch(rf"{tmp_path}/none (is empty|holds no artifacts yet): run mlxchat first\n", text)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("verb", ["chat", "report"])
def test_verbs_without_a_run_say_what_to_do(verb: str, say: Any, tmp_path: Path) -> None:
    more = ["-p", "hi"] if verb == "chat" else []
    text = say(verb, f"outputs={tmp_path}/none", *more, code=2)
    assert text.startswith("error: ")
    assert "mlxchat" in text
    assert not (tmp_path / "none").exists()


def test_removed_step_is_not_planned(say: Any, tmp_path: Path) -> None:
    text = say(
        "plan",
        "~pipeline.midtrain",
        "~pipeline.eval_mid",
        "pipeline.sft.checkpoint=pretrain",
        f"outputs={tmp_path}/none",
    )
    assert list(states(text)) == [step for step in STEPS if step not in ("midtrain", "eval_mid")]
    assert text.endswith("8 steps: 0 done, 8 to run\n")


def test_added_step_is_planned(say: Any, tmp_path: Path) -> None:
    text = say("plan", "+pipeline.again={stage: sft, checkpoint: rl}", f"outputs={tmp_path}/none")
    assert "\nagain " in text
    assert text.endswith("11 steps: 0 done, 11 to run\n")


def test_target_plans_its_inputs(say: Any, tmp_path: Path) -> None:
    assert list(states(say("plan", "stage=pretrain", f"outputs={tmp_path}/none"))) == [
        "corpus",
        "tokenizer",
        "pretrain",
    ]


def test_unwritable_outputs_folder_is_refused(mlxchat: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        done = mlxchat("experiment=smoke", f"outputs={place}")
        assert done.returncode == 2
        assert "starts" not in done.stdout
        assert re.fullmatch(rf"error: outputs folder {place} cannot be written .*outputs=PATH.*\n", done.stderr)


def test_status_shows_every_step(finished: Any, say: Any) -> None:
    text = say("status", f"outputs={finished.outputs}")
    assert {line.split()[0] for line in text.splitlines()[1:]} == set(STEPS)
    assert "left over" not in text


def test_status_names_unfinished_steps(outputs: Path, say: Any) -> None:
    work = outputs / "work" / ("a" * 52)
    Records(work / "attempts.jsonl").append(
        {"attempt": 1, "started": "2026-01-01T00:00:00+00:00", "step": "pretrain", "run": "r", "pid": 1, "host": "h"}
    )
    Records(work / "ckpt" / "records" / "metrics.jsonl").append({"iteration": 7})
    (line,) = (line for line in say("status", f"outputs={outputs}").splitlines() if "killed" in line)
    assert re.fullmatch(r"  pretrain +killed at iteration 7", line)


def test_ls_lists_artifacts_newest_last(finished: Any, say: Any) -> None:
    lines = say("ls", f"outputs={finished.outputs}").splitlines()[:-1]
    folders = {path.name for path in (finished.outputs / "store").iterdir() if not path.name.startswith("tokens-")}
    assert {line.split()[2] for line in lines} == folders
    assert len(lines) == len(folders) == 10
    assert sorted(line[:16] for line in lines) == [line[:16] for line in lines]


def test_ls_summarises_encoded_text(finished: Any, say: Any) -> None:
    encoded = [path for path in (finished.outputs / "store").iterdir() if path.name.startswith("tokens-")]
    last = say("ls", f"outputs={finished.outputs}").splitlines()[-1]
    assert re.match(rf"and {len(encoded)} folders of encoded text, tokens-\* \(\d[\d.]* [kM]?B\)", last)


def test_ls_formats_numbers(finished: Any, say: Any) -> None:
    assert not re.search(r"\de[+-]\d", say("ls", f"outputs={finished.outputs}"))


def test_graph_has_every_step_once(finished: Any, tiny: tuple[str, ...], say: Any) -> None:
    text = say("graph", *tiny, f"outputs={finished.outputs}")
    assert re.findall(r"(\w+) \[(\w+)\]", text) != []
    assert sorted(step for step, _ in re.findall(r"(\w+) \[(\w+)\]", text)) == sorted(STEPS)
    assert {state for _, state in re.findall(r"(\w+) \[(\w+)\]", text)} == {"done"}
    assert text.splitlines()[0] == "corpus [done]"
    assert "└─ tokenizer [done]" in text


def test_mermaid_graph_has_edges_and_marks_done_steps(finished: Any, tiny: tuple[str, ...], say: Any) -> None:
    text = say("graph", "--format", "mermaid", *tiny, f"outputs={finished.outputs}", "rl.temperature=0.9")
    assert text.startswith("flowchart LR\n")
    edges = set(re.findall(r"^  (\w+) --> (\w+)$", text, re.MULTILINE))
    assert edges == {
        ("corpus", "tokenizer"), ("corpus", "pretrain"), ("tokenizer", "pretrain"), ("pretrain", "midtrain"),
        ("midtrain", "sft"), ("sft", "rl"), ("pretrain", "eval_base"), ("corpus", "eval_base"),
        ("midtrain", "eval_mid"), ("sft", "eval_sft"), ("rl", "eval_rl"),
    }  # fmt: skip
    assert set(re.findall(r"(\w+)\[\w+\]:::done", text)) == set(STEPS) - {"rl", "eval_rl"}


@pytest.mark.skipif(sys.platform != "linux", reason="Accelerate serves MLX on a Mac")
def test_doctor_accepts_this_machine_and_names_the_blas(mlxchat: CommandLine, tmp_path: Path) -> None:
    done = mlxchat("doctor", cwd=tmp_path, environ={"OPENBLAS_NUM_THREADS": "1"})
    marks = {line.split()[1]: line.split()[0] for line in done.stdout.splitlines()}
    speed = marks.pop("speed")  # depends on what else the machine does
    assert (done.returncode, speed) in ((0, "ok"), (1, "wrong")), done.stdout
    assert set(marks.values()) <= {"ok", "note"}
    assert {"python", "versions", "device", "memory", "disk"} <= set(marks)
    if "(cpu)" in done.stdout:
        assert re.search(r"^ok +blas +OpenBLAS.*\(/.*openblas.*\)$", done.stdout, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="Accelerate serves MLX on a Mac")
def test_doctor_reports_a_missing_blas(mlxchat: CommandLine) -> None:
    done = mlxchat("doctor", environ={"MLXCHAT_BLAS": "off"})
    if "(cpu)" in done.stdout:
        assert done.returncode == 1
        assert re.search(r"^wrong +blas +switched off by MLXCHAT_BLAS=off.*slow", done.stdout, re.MULTILINE)


def test_report_prints_a_table_and_its_path(finished: Any, outputs: Path, mlxchat: CommandLine) -> None:
    done = mlxchat("report", f"outputs={outputs}")
    assert done.returncode == 0, done.stderr
    assert "val bpb" in done.stdout
    written = Path(done.stdout.split("report: ")[1].strip())
    assert written.is_relative_to(outputs / "runs")
    assert written.stat().st_size > 1000


def test_chat_answers_one_question(finished: Any, mlxchat: CommandLine) -> None:
    done = mlxchat("chat", "-p", "Who are you?", "--max-tokens", "5", f"outputs={finished.outputs}")
    assert done.returncode == 0
    assert re.fullmatch(r"model: rl of run smoke \(rl-d2-\S+, [\d: -]+\)\n", done.stderr)
    again = mlxchat("chat", f"outputs={finished.outputs}", "-p", "Who are you?", "--max-tokens=5", "--model", "rl")
    assert again.stdout == done.stdout != "", "greedy answers of the same, latest model"


def test_chat_refuses_other_artifacts(finished: Any, say: Any) -> None:
    text = say("chat", "-p", "hi", "--model", "corpus", f"outputs={finished.outputs}", code=2)
    assert re.match(r"error: corpus-\S+ is not a model: its kind is corpus", text)


# Prints what a command line imported, and how many function calls it took: a measure that no other process disturbs.
WATCH = """
import cProfile, pstats, sys
from mlxchat.cli import main
from mlxchat.commands.arguments import parser_of
profile = cProfile.Profile()
try:
    profile.runcall(main, sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
heavy = {"mlx", "numpy", "pyarrow", "matplotlib", "safetensors", "tiktoken", "rich", "huggingface_hub", "jinja2"}
print("watched", pstats.Stats(profile).total_calls, sorted(heavy & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["status"], ["ls"], ["plan"], ["graph"], ["run"]], ids=lambda part: part[0]
)
def test_reading_verbs_are_quick_and_import_nothing_heavy(
    arguments: list[str], finished: Any, outputs: Path, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    """Composing with Hydra takes 3 million calls; the second time the composed configuration is read from its cache."""
    settings = tiny if arguments[0] in ("plan", "graph", "run") else ()
    place = [] if arguments[0].startswith("--") else [f"outputs={outputs}"]

    def watch() -> tuple[int, str, list[str]]:
        done = subprocess.run(
            [sys.executable, "-c", WATCH, *arguments, *settings, *place],
            cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300,
        )  # fmt: skip
        *lines, last = done.stdout.splitlines()
        _, calls, modules = last.split(maxsplit=2)
        return int(calls), modules, lines

    watch()
    calls, modules, lines = watch()
    assert modules == "[]"
    assert calls < 1_000_000
    if arguments == ["run"]:
        assert lines[-1].startswith("nothing to do: all 10 steps are done")


def test_second_run_does_nothing(outputs: Path, tiny: tuple[str, ...], mlxchat: CommandLine) -> None:
    def files() -> dict[Path, int]:
        return {path: path.lstat().st_mtime_ns for path in outputs.rglob("*") if not path.is_dir()}

    before = files()
    done = mlxchat(*tiny, f"outputs={outputs}")
    assert done.returncode == 0
    assert set(states(done.stdout).values()) == {"done"}
    assert done.stdout.splitlines()[-1].startswith("nothing to do: all 10 steps are done")
    assert files() == before


def test_default_verb_is_run(finished: Any) -> None:
    lines = finished.stdout.splitlines()
    assert "10 steps: 0 done, 10 to run" in lines
    assert [line.split()[0] for line in lines if re.match(r"\w+ +starts", line)] == STEPS
    assert [line.split()[0] for line in lines if re.match(r"\w+ +done in ", line)] == STEPS
    assert lines[-1].startswith("report: ")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (DataError("x"), 2),
        (StoreError("x"), 2),
        (StepFailed("x"), 1),
        (Interrupted("x", 2), 130),
        (Interrupted("x", 15), 143),
        (KeyboardInterrupt(), 130),
    ],
    ids=repr,
)
def test_exit_code_depends_on_the_error(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: object) -> int:
        raise error

    monkeypatch.setattr("mlxchat.commands.inspect._status", fail)
    with pytest.raises(SystemExit) as caught:
        main(["status"])
    assert caught.value.code == code
    assert "Traceback" not in capsys.readouterr().err


def test_signal_stop_is_not_called_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(options: object) -> int:
        raise Interrupted("pretrain stopped: saved at iteration 82 of 1,500.", 2)

    monkeypatch.setattr("mlxchat.commands.inspect._status", stop)
    with pytest.raises(SystemExit):
        main(["status"])
    assert capsys.readouterr().err == "pretrain stopped: saved at iteration 82 of 1,500.\n"


def test_multiline_errors_are_indented(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(options: object) -> int:
        raise ConfigError("one\ntwo")

    monkeypatch.setattr("mlxchat.commands.inspect._status", fail)
    with pytest.raises(SystemExit):
        main(["status"])
    assert capsys.readouterr().err == "error: one\n       two\n"


@pytest.mark.skipif(sys.platform != "linux", reason="a Mac has a GPU")
def test_missing_gpu_names_the_setting(outputs: Path, tiny: tuple[str, ...], mlxchat: CommandLine) -> None:
    if "(cpu)" not in mlxchat("doctor").stdout:
        pytest.skip("there is one")
    done = mlxchat(*tiny, "machine.device=gpu", "pretrain.num_iterations=2", "stage=pretrain", f"outputs={outputs}")
    assert done.returncode == 2, done.stderr
    assert re.search(r"error: machine\.device is (\")?gpu", done.stderr)
    assert "Traceback" not in done.stderr


def test_console_script_is_the_same_program(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("mlxchat")
    done = subprocess.run([script, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"mlxchat {__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["plan"]], ids=lambda part: part[0])
def test_closed_pipe_is_no_error(arguments: list[str], start_mlxchat: Any) -> None:
    process = start_mlxchat(*arguments, stderr=subprocess.PIPE)
    process.stdout.close()  # long before anything is printed
    _, complaint = process.communicate(timeout=60)
    assert (complaint, process.returncode) == ("", 0)


def test_python_warnings_are_hidden(finished: Any) -> None:
    assert "Warning" not in finished.stderr


def test_manifests_record_the_command(finished: Any, tiny: tuple[str, ...]) -> None:
    for place in (finished.outputs / "store").iterdir():
        assert read_manifest(place)["argv"] == ["mlxchat", *tiny, f"outputs={finished.outputs}"]
