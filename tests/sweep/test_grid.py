"""`mlxchat -m`: shared steps run once and first, failures stay with their jobs, the same command resumes."""

import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.commands import run_captured, saved_trainings, wait_until
from mlxchat.errors import StoreError
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import latest, resolve
from mlxchat.store.store import Store
from mlxchat.sweep.sweeper import read_sweep
from sweep.swept import Swept

RATES = [0.001, 0.0013, 0.00169]
COLUMNS = {"job", "optimizer.matrix_lr", "pretrain.val_bpb", "run", "id", "status"}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, short: tuple[str, ...]) -> tuple[Swept, str, list[str]]:
    """A sweep of three jobs: its outputs, what it printed, its command."""
    outputs = tmp_path_factory.mktemp("three") / "outputs"
    command = ["-m", *short, f"optimizer.matrix_lr={','.join(map(str, RATES))}", f"outputs={outputs}"]
    done = run_captured(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    return Swept(outputs), done.stdout, command


def test_shared_steps_run_once(three):
    swept, text, _ = three
    assert swept.started() == {"corpus": 1, "tokenizer": 1, "pretrain": 3}
    first, tokenizer, second = (text.index(line) for line in ("── job 1/3", "tokenizer  done", "── job 2/3"))
    assert first < tokenizer < second


def test_table_has_a_row_per_job_best_first(three):
    swept, text, _ = three
    made = {
        manifest["config"]["optimizer"]["matrix_lr"]: manifest["metrics"]["val_bpb"]
        for manifest in Store(swept.outputs).recent("pretrain")
    }  # fmt: skip
    assert sorted(made) == RATES
    rows = swept.rows()
    assert all(row.keys() == COLUMNS for row in rows)
    assert {row["optimizer.matrix_lr"]: row["pretrain.val_bpb"] for row in rows} == pytest.approx(made, abs=1e-4)
    numbers = [row["pretrain.val_bpb"] for row in rows]
    assert numbers == sorted(numbers)
    assert {row["job"]: row["optimizer.matrix_lr"] for row in rows} == dict(enumerate(RATES, start=1))
    assert (swept.folder / "table.md").read_text() in text
    report = (swept.folder / "report.md").read_text()
    assert [row["id"] for row in rows if f"| {row['id']} |" not in report] == []


def test_best_job_has_a_name_and_jobs_have_none_of_a_run(three):
    """Bug: after a sweep the names of the run, its steps and `chat` were the last job, which may be half-trained."""
    swept, text, _ = three
    store, rows = Store(swept.outputs), swept.rows()
    assert text.endswith("smoke-sweep/best. To chat with it: mlxchat chat smoke-sweep/best\n")
    assert resolve(store, "smoke-sweep/best").name == rows[0]["id"]
    with pytest.raises(StoreError, match='"smoke" is no artifact or run'):
        resolve(store, "smoke")


def test_sweep_leaves_the_latest_run(swept, short, say):
    store = Store(swept.outputs)
    before = latest(store), resolve(store, "smoke/pretrain"), resolve(store, "pretrain")
    say("-m", *short, "optimizer.matrix_lr=0.011,0.031", f"outputs={swept.outputs}")
    store.forget()
    assert (latest(store), resolve(store, "smoke/pretrain"), resolve(store, "pretrain")) == before
    assert resolve(store, "smoke-sweep/best").name == swept.rows()[0]["id"]


def test_repeated_sweep_runs_nothing(three, say):
    swept, _, command = three
    before, table = swept.started(), swept.rows()
    runs = len(list((swept.outputs / "runs").iterdir()))
    text = say(*command)
    assert len(re.findall(r"^── job \d+/3 optimizer\.matrix_lr=\S+ is done already  pretrain", text, re.M)) == 3
    assert (swept.started(), swept.rows()) == (before, table)
    assert len(list((swept.outputs / "runs").iterdir())) == runs


def test_failed_shared_step_ends_only_its_jobs(swept, short, say):
    before = swept.started()
    settings = ["tokenizer.vocab_size=60000,310", "optimizer.matrix_lr=0.01,0.03"]
    say("-m", *short, *settings, f"outputs={swept.outputs}", code=1)
    rows = {(row["tokenizer.vocab_size"], row["optimizer.matrix_lr"]): row for row in swept.rows()}
    assert {key: row["status"] for key, row in rows.items()} == {
        (60000, 0.01): "failed", (60000, 0.03): "failed", (310, 0.01): "done", (310, 0.03): "done",
    }  # fmt: skip
    assert rows[60000, 0.03]["error"].startswith("tokenizer.vocab_size is 60000, but the corpus yields only")
    assert swept.started() - before == {"tokenizer": 2, "pretrain": 2}


def test_forced_shared_step_runs_once(swept, short, say):
    before = swept.started()
    say("-m", *short, "force=[tokenizer]", "optimizer.matrix_lr=0.01,0.03", f"outputs={swept.outputs}")
    assert swept.started() - before == {"tokenizer": 1, "pretrain": 2}


def test_jobs_are_all_combinations_once(tmp_path):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "own.yaml").write_text("defaults: [d2]\nname: own\n")
    (tmp_path / "mine" / "experiment").mkdir()
    text = "# @package _global_\ndefaults: [smoke]\nhydra: {sweeper: {params: {tokenizer.vocab_size: '300,310'}}}\n"
    (tmp_path / "mine" / "experiment" / "sizes.yaml").write_text(text)
    mine = ["--config-dir", str(tmp_path / "mine")]

    def titles(*arguments: str) -> list[str]:
        found = read_sweep(["-m", "stage=tokenizer", f"outputs={tmp_path}/outputs", *arguments])
        return [job.title for job in found]

    assert titles("experiment=smoke", "targets=[corpus],[corpus]", "machine=cpu,cuda_80gb") == [
        "machine=cpu", "machine=cuda_80gb",
    ]  # fmt: skip
    assert titles(*mine, "experiment=sizes", "model=own,d2") == [
        f"tokenizer.vocab_size={size} model={model}" for size in (300, 310) for model in ("own", "d2")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiment=smoke", "seed=1,x", "model=d2,d65"], r'(?s)no option "d65".*seed'),
        (["seed=interval(1,2)"], "to search an interval use sweep=tpe"),
        (["sweep.metric=bpb", "seed=1,2"], "expected STEP.METRIC"),
        (["model=glob(x*)"], "List the values: model=A,B"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_refused_before_anything_is_written(arguments, message, tmp_path, say):
    text = say("-m", *arguments, f"outputs={tmp_path}/outputs", code=2)
    assert re.search(message, text), text
    assert not (tmp_path / "outputs").exists()


def test_sweep_plan_counts_shared_steps_once(say, tmp_path):
    command = ["experiment=smoke", "stage=pretrain", "optimizer.matrix_lr=0.01,0.02", "model=d2,d4"]
    command += [f"outputs={tmp_path}/outputs"]
    text = say("plan", "-m", *command)
    first, *others = re.split(r"^job \d/4 optimizer.matrix_lr=0.0\d model=d\d\n", text, flags=re.M)[1:]
    assert re.findall(r"^  (\w+) +run ", first, re.M) == ["corpus", "tokenizer", "pretrain"]
    assert [re.findall(r"^  (\w+) +run .*MB with", other, re.M) for other in others] == [["pretrain"]] * 3
    assert text.splitlines()[-1].startswith("4 jobs, 6 steps: 0 done, 6 to run")
    assert list(tmp_path.iterdir()) == []


pytest.importorskip("submitit")

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def sweep(outputs: Path, tiny: tuple[str, ...], start_mlxchat: Any) -> Start:
    """Start a sweep of pretrainings as processes that submitit starts."""

    def start(*overrides: str) -> subprocess.Popen[str]:
        command = ["-m", *tiny, "stage=pretrain", *overrides, "executor=submitit_local", f"outputs={outputs}"]
        return start_mlxchat(*command)  # type: ignore[no-any-return]  # the fixture is Any

    return start


def test_jobs_give_the_same_table(sweep, outputs, short, say, swept):
    settings = ["optimizer.matrix_lr=0.01,0.03", "tokenizer.vocab_size=280"]
    process = sweep("pretrain.num_iterations=1", *settings)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert len(re.findall(r"^tokenizer +done by submitit job", text, re.M)) == 1
    rows = swept.rows()
    assert [row["status"] for row in rows] == ["done"] * 2
    again = say("-m", *short, *settings, f"outputs={outputs}")
    assert len(re.findall("is done already", again)) == 2
    assert swept.rows() == rows


def test_stopped_sweep_saves_its_jobs(sweep, outputs, swept):
    process = sweep("pretrain.num_iterations=3000,3001", "machine.checkpoint_seconds=0")
    wait_until(lambda: len(saved_trainings(outputs)) == 2, process)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGINT, text
    assert [row["status"] for row in swept.rows()] == ["interrupted"] * 2
    assert len(list((outputs / "work").glob("*/ckpt"))) == 2


@pytest.mark.slow
def test_jobs_outlive_their_command(sweep, outputs, swept):
    command = ["pretrain.num_iterations=150,151", "machine.checkpoint_seconds=0"]
    process = sweep(*command)
    wait_until(lambda: len(saved_trainings(outputs)) == 2, process)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=600)
    assert "the same command awaits it" in text
    again = sweep(*command)
    text, _ = again.communicate(timeout=600)
    assert again.returncode == 0, text
    assert [row["status"] for row in swept.rows()] == ["done"] * 2
    made = [read_manifest(path) for path in (outputs / "store").glob("pretrain-*")]
    assert sorted(len(manifest["attempts"]) for manifest in made)[-1] == 1, "awaited, not submitted again"
