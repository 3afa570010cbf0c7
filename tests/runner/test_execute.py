"""Execution of steps: atomic, correctly reported, and never repeated."""

import io
import json
import os
import shutil
import signal
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from kit.toys import CHAIN, ONE, started
from mlxchat.errors import Interrupted, StepFailed
from mlxchat.runner import process
from mlxchat.runner.leader import Execution, lead
from mlxchat.runner.process import Progress
from mlxchat.store import locks
from mlxchat.store.files import Record, Records
from mlxchat.store.naming import refs_of


def states(toys: Any, **options: Any) -> dict[str, str]:
    """Return step → 'done', or the reason to run."""
    return {step.name: step.reason if not step.done else "done" for step in toys.plan(CHAIN, **options)}


def result(toys: Any, step: str) -> str:
    """Return what the artifact of a step of CHAIN holds."""
    key = {planned.name: planned.key for planned in toys.plan(CHAIN)}[step]
    place = toys.store.find_made(key)
    assert place is not None
    return str((place / "result.txt").read_text())


def events(run: Any) -> list[tuple[str, str | None]]:
    return [(event["event"], event.get("step")) for event in Records(run.folder / "events.jsonl").read()]


COUNTED = """
with open(ctx.out.parents[2] / "count", "a") as file:
    file.write("x")
(ctx.out / "result.txt").write_text("made")
"""


def count(toys: Any) -> int:
    return len((toys.outputs / "count").read_text())


def test_failed_step_has_a_log_and_only_it_is_retried(toys):
    copy = (toys.package / "copy.py").read_text()
    toys.add("copy", "(ctx.out / 'rest').touch(); raise OSError('no')", inputs={"source": "thing"}, config=("other",))
    with pytest.raises(StepFailed, match="step two failed: OSError: no") as caught:
        toys.run(toys.plan(CHAIN))
    assert caught.value.exit_code == 1
    assert "raise OSError('no')" in Path(str(caught.value).split("Traceback: ")[1]).read_text()
    assert [path.name[:4] for path in (toys.outputs / "store").iterdir()] == ["make"]
    (toys.package / "copy.py").write_text(copy)
    sys.modules.pop(f"{toys.package.name}.copy")
    run = toys.run(toys.plan(CHAIN))
    assert events(run) == [
        ("run_started", None), ("step_cached", "one"), ("step_started", "two"), ("step_done", "two"),
        ("run_done", None),
    ]  # fmt: skip
    two = toys.plan(CHAIN)[1]
    manifest = toys.store.made(two.key)
    assert [(attempt["outcome"], attempt["error"]) for attempt in manifest["attempts"]] == [
        ("failed", "OSError: no"), ("done", None),
    ]  # fmt: skip
    assert [file["path"] for file in manifest["outputs"]] == ["result.txt"], "nothing of the failed attempt is left"
    assert list((toys.outputs / "work").iterdir()) == []
    assert refs_of(toys.store, run.name) == refs_of(toys.store)
    assert refs_of(toys.store)["two"] == toys.store.find_made(two.key)


# Numbers 0 to 9 make the same bytes.
ROUNDED = "(ctx.out / 'result.txt').write_text(str(ctx.config.toy.number // 10))"
THREE = {**CHAIN, "three": {"stage": "copy", "source": "two"}}


@pytest.mark.parametrize(("number", "remade"), [(5, ["one"]), (15, ["one", "two", "three"])])
def test_input_rebuilt_with_equal_bytes_reruns_nothing(number, remade, toys):
    toys.add("make", ROUNDED)
    toys.run(toys.plan(THREE))
    before = refs_of(toys.store)["three"]
    toys.config.toy.number = number
    plan = toys.plan(THREE)
    assert [step.state for step in plan] == ["run", "maybe", "maybe"]
    assert started(toys.run(plan)) == remade
    assert {step.state for step in toys.plan(THREE)} == {"done"}
    assert (refs_of(toys.store)["three"] == before) == (remade == ["one"])


def test_missing_artifact_is_rebuilt_alone(toys):
    toys.run(toys.plan(THREE))
    shutil.rmtree(refs_of(toys.store)["two"])
    assert [step.state for step in toys.plan(THREE)] == ["done", "run", "maybe"]
    assert started(toys.run(toys.plan(THREE))) == ["two"]


def test_manifest_records_what_the_stage_reports(toys):
    toys.add("make", """
        ctx.metrics |= {"loss": 2.5, "tokens_per_second": 10.0}
        ctx.derived["width"] = 3
        ctx.log({"iteration": 1, "loss": 2.5})
        (ctx.out / "result.txt").touch()
    """)  # fmt: skip
    tracked: list[tuple[str, Record]] = []
    toys.run(toys.plan(ONE), on_metrics=lambda step, record: tracked.append((step, record)))
    (manifest,) = toys.store.manifests()
    reported = [manifest[key] for key in ("metrics", "tokens_per_second", "derived", "config", "overrides")]
    assert reported == [{"loss": 2.5}, 10.0, {"width": 3}, {"seed": 1, "toy": {"number": 1}}, ["toy.number=1"]]
    place = toys.store.find(manifest["rid"])
    assert Records(place / "metrics.jsonl").read() == [{"iteration": 1, "loss": 2.5}]
    assert tracked == [("one", {"iteration": 1, "loss": 2.5})]


def test_undeclared_settings_cannot_be_read(toys):
    toys.add("make", "ctx.config.other")
    with pytest.raises(StepFailed, match=r"stage make reads config\.other, which it does not declare"):
        toys.run(toys.plan(ONE))


RESUMABLE = """
done = ctx.work / "0001"
if not done.exists():
    done.mkdir(parents=True)
    ctx.log({{"iteration": 1}})
    os.kill(os.getpid(), signal.{signal})
    assert ctx.should_stop()
    raise ctx.stop("iteration 1 of 2")
ctx.rewind_records(1)
(ctx.out / "result.txt").write_text("continued")
"""


TWICE = "SIGTERM)\n    time.sleep(0.06)\n    os.kill(os.getpid(), signal.SIGTERM"


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), (TWICE, 143)])
def test_interrupted_step_resumes(name, code, toys, monkeypatch):
    if name == TWICE:  # only a job outlives it
        monkeypatch.setenv("SLURM_JOB_ID", "1")
    toys.add("make", RESUMABLE.format(signal=name))
    with pytest.raises(Interrupted, match=r"one stopped at iteration 1 of 2\. The same command continues") as caught:
        toys.run(toys.plan(CHAIN))
    assert caught.value.exit_code == code
    assert list((toys.outputs / "store").iterdir()) == []
    assert states(toys)["one"] == "missing, resumes"
    toys.run(toys.plan(CHAIN))
    manifest = toys.store.made(toys.plan(CHAIN)[0].key)
    assert [(attempt["outcome"], attempt["resumed_from"]) for attempt in manifest["attempts"]] == [
        ("interrupted", None), ("done", 1),
    ]  # fmt: skip
    assert result(toys, "one") == "continued"


def test_signal_stops_after_an_unaware_stage(toys):
    toys.add("make", "os.kill(os.getpid(), signal.SIGTERM); (ctx.out / 'result.txt').write_text('1')")
    with pytest.raises(Interrupted) as caught:
        toys.run(toys.plan(CHAIN))
    assert caught.value.exit_code == 143
    assert states(toys) == {"one": "done", "two": "missing"}


WAITS = """
ready, go = ctx.out.parents[2] / "ready", ctx.out.parents[2] / "go"
ready.touch()
while not go.exists():
    time.sleep(0.01)
"""


@pytest.mark.parametrize("fails", [False, True])
def test_waiting_process_shares_the_holders_result_or_error(fails, toys):
    toys.add("make", WAITS + COUNTED + ("raise ValueError('oh no')" if fails else ""))
    raised: list[BaseException] = []

    def first() -> None:
        try:
            toys.run(toys.plan(ONE))
        except BaseException as error:
            raised.append(error)

    heard: list[str] = []

    def say(line: str) -> None:
        heard.append(line)
        if "waits" in line:
            (toys.outputs / "go").touch()

    thread = threading.Thread(target=first)
    thread.start()
    while not (toys.outputs / "ready").exists():
        thread.join(0.01)
    with pytest.raises(StepFailed, match="failed in another process: ValueError: oh no") if fails else nullcontext():
        toys.run(toys.plan(ONE), say=say)
    thread.join()
    assert [type(error) for error in raised] == [StepFailed] * fails
    assert count(toys) == 1
    assert heard == [f"one        waits: process {os.getpid()} on {os.uname().nodename} (run run1) is making it"]


def test_stop_ends_the_wait(toys):
    (step,) = toys.plan(ONE)
    toys.store.prepare()

    def say(line: str) -> None:
        if "waits" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    with locks.hold(toys.store.lock(step.key), {}), pytest.raises(Interrupted, match="while one waited"):
        toys.run(toys.plan(ONE), say=say)


def test_forced_step_with_new_bytes_reruns_downstream(toys):
    toys.run(toys.plan(CHAIN))
    toys.add("make", "(ctx.out / 'result.txt').write_text('other')")
    run = toys.run(toys.plan(CHAIN, force=["one"]))
    assert ("step_done", "two") in events(run)
    assert result(toys, "two") == "other 1"
    toys.add("make", "(ctx.out / 'result.txt').write_text('third')")
    toys.run(toys.plan(ONE, force=["one"]))
    assert states(toys) == {"one": "done", "two": "input changed: source (one)"}


def test_work_on_other_input_bytes_is_not_resumed(toys):
    toys.add("copy", """
        text = (ctx.inputs["source"] / "result.txt").read_text()
        saved = ctx.work / "state"
        if not saved.exists():
            saved.parent.mkdir(parents=True)
            saved.write_text(text)
            raise ctx.stop("half")
        (ctx.out / "result.txt").write_text(f"{saved.read_text()} then {text}")
    """, inputs={"source": "thing"}, config=("other",))  # fmt: skip
    with pytest.raises(Interrupted):
        toys.run(toys.plan(CHAIN))
    toys.add("make", "(ctx.out / 'result.txt').write_text('new')")
    with pytest.raises(Interrupted):
        toys.run(toys.plan(CHAIN, force=["one"]))
    toys.run(toys.plan(CHAIN))
    assert result(toys, "two") == "new then new"


def leading(toys: Any, count: int, **options: Any) -> list[Execution]:
    """Return executions of the same plan, with a run each."""
    return [Execution(toys.plan(CHAIN), toys.store, lambda: toys.make_run(**options)) for _ in range(count)]


def test_runs_with_one_leader_share_steps_and_all_end(toys):
    toys.add("make", COUNTED)
    both = leading(toys, 2)
    lead(both, toys.store)
    assert (count(toys), [each.has_ended for each in both]) == (1, [True, True])
    assert [event for event, _ in events(both[1].run)] == ["run_started", "step_cached", "step_cached", "run_done"]


@pytest.mark.parametrize("fail_fast", [False, True])
def test_failure_of_a_shared_step_is_that_of_all_its_runs(fail_fast, toys):
    toys.add("make", COUNTED + "raise OSError('no')")
    both = leading(toys, 2, fail_fast=fail_fast)
    lead(both, toys.store)
    assert count(toys) == 1
    errors = [str(each.error).splitlines()[0] for each in both if each.error]
    assert errors == ["step one failed: OSError: no"] * (1 if fail_fast else 2)
    assert [each.has_begun for each in both] == [True, not fail_fast]


def test_eta_ignores_the_first_unit(monkeypatch):
    # After one iteration of 54 s, 53 of which compiled, five hours were predicted for a training of two minutes.
    now = 0.0
    monkeypatch.setattr(process.time, "monotonic", lambda: now)
    out = io.StringIO()
    with Progress("pretrain", 101, "iterations", stream=out) as line:
        for done, now in ((1, 50.0), (2, 60.0), (11, 70.0)):  # noqa: B007 (`now` is the clock)
            line.update(done)
    found = [text.rpartition("  ")[2].strip() for text in out.getvalue().splitlines()]
    assert found == ["1/101 iterations", "eta 16m30s", "eta 3m00s"]


SECRETS = {
    "HF_TOKEN": "hf_abcdefgh12345", "WANDB_API_KEY": "0123456789abcdef0123", "MY_SECRET": 'quoted "secret" ümläut',
    "DB_PASSWORD": "pa/ss word+1", "GITHUB_TOKEN": "ghp_zzzzzzzzzzzz", "AWS_SECRET_ACCESS_KEY": "AKsecret+/=long",
}  # fmt: skip


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return SECRETS


def leaks(folder: Path, secrets: dict[str, str]) -> list[str]:
    """Return the files that hold a secret in any of the forms in which it could be written."""
    found = []
    for path in folder.rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        for name, value in secrets.items():
            forms = {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
            found += [f"{path}: {name}" for form in forms if form.encode() in data or form in path.name]
    return found


def test_secrets_reach_no_file_or_output(toys, secrets, monkeypatch):
    everything = " ".join(secrets.values())
    monkeypatch.setattr(sys, "argv", ["mlxchat", f"name='{everything}'"])
    toys.add("make", """
        told = " ".join(os.environ[name] for name in ("HF_TOKEN", "MY_SECRET", "DB_PASSWORD"))
        ctx.log({"iteration": 1, "told": told})
        ctx.externals.append({"url": f"https://x/{os.environ['HF_TOKEN']}"})
        ctx.derived["header"] = told
        (ctx.out / "result.txt").write_text("1")
    """)  # fmt: skip
    told = "' '.join(os.environ[name] for name in ('WANDB_API_KEY', 'MY_SECRET', 'GITHUB_TOKEN'))"
    toys.add("copy", f"raise ValueError({told})", inputs={"source": "thing"}, config=("other",))
    with pytest.raises(StepFailed) as caught:
        toys.run(toys.plan(CHAIN))
    assert leaks(toys.outputs, secrets) == []
    text = "\n".join([str(caught.value), *toys.said])
    assert [name for name, value in secrets.items() if value in text] == []
    assert "<WANDB_API_KEY>" in str(caught.value)
    manifest = toys.store.made(toys.plan(CHAIN)[0].key)
    assert manifest["externals"] == [{"url": "https://x/<HF_TOKEN>"}]


def test_secrets_of_the_command_line_reach_no_file(say, tiny, tmp_path, monkeypatch):
    secrets = {"HF_TOKEN": "hf_abcdefgh12345", "WANDB_API_KEY": "0123456789abcdef0123", "DB_PASSWORD": "pass-word-1"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    settings = [*tiny, "stage=corpus", f"outputs={tmp_path / 'outputs'}"]
    planted = f'tracker.project="{secrets["HF_TOKEN"]} {secrets["DB_PASSWORD"]}"'
    sweep = ["-m", "corpus.shard_documents=5,6", f"tracker.project={secrets['HF_TOKEN']},{secrets['DB_PASSWORD']}"]
    for arguments in ([*settings, planted], [*sweep, *settings]):
        monkeypatch.setattr(sys, "argv", ["mlxchat", *arguments])
        said = say(*arguments)
        assert [name for name, value in secrets.items() if value in said] == []
    assert list((tmp_path / "outputs" / "multirun").glob("*/table.md"))
    assert leaks(tmp_path / "outputs", secrets) == []
