"""`mlxchat -m`: shared steps run once and first, failures stay with their jobs, the same command resumes."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from kit.commands import CommandLine
from mlxchat.errors import ConfigError
from mlxchat.store.store import Store
from mlxchat.sweep.launchers import HydraSettings
from mlxchat.sweep.sweeper import read_sweep

RATES = [round(0.001 * 1.3**power, 6) for power in range(5)]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def five(
    tmp_path_factory: pytest.TempPathFactory, mlxchat: CommandLine, short: tuple[str, ...]
) -> tuple[Path, str, list[str]]:
    """A sweep of five jobs: its outputs, what it printed, its command."""
    outputs = tmp_path_factory.mktemp("five") / "outputs"
    command = ["-m", *short, f"optimizer.matrix_lr={','.join(map(str, RATES))}", f"outputs={outputs}"]
    done = mlxchat(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    return outputs, done.stdout, command


def test_shared_steps_run_once_before_all_jobs(five: Any, swept: Any) -> None:
    outputs, text, _ = five
    assert type(swept)(outputs).started() == {"corpus": 1, "tokenizer": 1, "pretrain": 5}
    assert (
        text.index("── shared by 5 jobs: corpus, tokenizer") < text.index("tokenizer  done") < text.index("── job 1/5")
    )


def test_table_has_a_row_per_job_best_first(five: Any, swept: Any) -> None:
    outputs, text, _ = five
    found = type(swept)(outputs)
    made = {
        manifest["config"]["optimizer"]["matrix_lr"]: manifest["metrics"]["val_bpb"]
        for manifest in Store(outputs).recent("pretrain")
    }  # fmt: skip
    assert sorted(made) == RATES
    rows = found.rows()
    assert [row.keys() for row in rows] == [{"job", "optimizer.matrix_lr", "pretrain.val_bpb", "status"}] * 5
    assert {row["optimizer.matrix_lr"]: row["pretrain.val_bpb"] for row in rows} == pytest.approx(made, abs=1e-4)
    numbers = [row["pretrain.val_bpb"] for row in rows]
    assert numbers == sorted(numbers)
    assert {row["job"]: row["optimizer.matrix_lr"] for row in rows} == dict(enumerate(RATES, start=1))
    with (found.folder / "table.csv").open() as file:
        assert [float(row["pretrain.val_bpb"]) for row in csv.DictReader(file)] == numbers
    assert (found.folder / "table.md").read_text() in text


def test_sweep_draws_a_plot_and_removes_temporary_files(five: Any) -> None:
    outputs, _, _ = five
    (folder,) = (outputs / "multirun").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "plot.png",
        "report.html",
        "report.md",
        "report",
        "sweep.json",
        "table.csv",
        "table.json",
        "table.md",
    }
    assert (folder / "plot.png").read_bytes().startswith(PNG)
    assert sorted(path.name for path in outputs.parent.iterdir()) == ["outputs"]


def test_repeated_sweep_runs_nothing(five: Any, mlxchat: CommandLine, swept: Any) -> None:
    outputs, _, command = five
    found = type(swept)(outputs)
    before, table = found.started(), found.rows()
    runs = len(list((outputs / "runs").iterdir()))
    again = mlxchat(*command)
    assert again.returncode == 0, again.stderr
    assert len(re.findall(r"^── job \d+/5 optimizer\.matrix_lr=\S+ is done already  pretrain", again.stdout, re.M)) == 5
    assert found.started() == before
    assert len(list((outputs / "runs").iterdir())) == runs
    assert found.rows() == table
    assert len(list((outputs / "multirun").iterdir())) == 2


def test_failed_job_does_not_stop_others(
    outputs: Path, tiny: tuple[str, ...], mlxchat: CommandLine, swept: Any
) -> None:
    vocabularies = "tokenizer.vocab_size=310,60000,320"
    done = mlxchat("-m", *tiny, "stage=tokenizer", vocabularies, f"outputs={outputs}")
    assert done.returncode == 1, done.stderr
    assert "error: tokenizer.vocab_size is 60000, but the corpus yields only" in done.stderr
    assert "Traceback" not in done.stderr
    failed, later = "── job 2/3 tokenizer.vocab_size=60000 failed: tokenizer.vocab_size is 60000", "── job 3/3"
    assert done.stdout.index(failed) < done.stdout.index(later)
    rows = type(swept)(outputs).rows()
    assert {row["tokenizer.vocab_size"]: row["status"] for row in rows} == {310: "done", 60000: "failed", 320: "done"}
    (error,) = [row["error"] for row in rows if "error" in row]
    assert error.startswith("tokenizer.vocab_size is 60000, but the corpus yields only")


def test_fail_fast_ends_the_sweep(outputs: Path, tiny: tuple[str, ...], mlxchat: CommandLine, swept: Any) -> None:
    vocabularies = "tokenizer.vocab_size=310,60000,320"
    done = mlxchat("-m", *tiny, "stage=tokenizer", vocabularies, "fail_fast=true", f"outputs={outputs}")
    assert done.returncode == 1, done.stderr
    rows = type(swept)(outputs).rows()
    found = {row["tokenizer.vocab_size"]: row["status"] for row in rows}
    assert found == {310: "done", 60000: "failed", 320: "not run"}


def test_failed_shared_step_ends_only_its_jobs(
    outputs: Path, short: tuple[str, ...], mlxchat: CommandLine, swept: Any
) -> None:
    found = type(swept)(outputs)
    before = found.started()
    settings = ["tokenizer.vocab_size=60000,310", "optimizer.matrix_lr=0.01,0.03"]
    done = mlxchat("-m", *short, *settings, f"outputs={outputs}")
    assert done.returncode == 1, done.stderr
    rows = {(row["tokenizer.vocab_size"], row["optimizer.matrix_lr"]): row for row in found.rows()}
    assert {key: row["status"] for key, row in rows.items()} == {
        (60000, 0.01): "failed",
        (60000, 0.03): "failed",
        (310, 0.01): "done",
        (310, 0.03): "done",
    }
    for rate in (0.01, 0.03):
        assert rows[60000, rate]["error"].startswith("shared step tokenizer: tokenizer.vocab_size is 60000")
    assert found.started() - before == {"tokenizer": 2, "pretrain": 2}


def test_forced_shared_step_runs_once(outputs: Path, short: tuple[str, ...], mlxchat: CommandLine, swept: Any) -> None:
    found = type(swept)(outputs)
    before = found.started()
    done = mlxchat("-m", *short, "force=[tokenizer]", "optimizer.matrix_lr=0.01,0.03", f"outputs={outputs}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert found.started() - before == {"tokenizer": 1, "pretrain": 2}


def test_table_shows_only_steps_of_its_jobs(
    outputs: Path, tiny: tuple[str, ...], mlxchat: CommandLine, swept: Any
) -> None:
    done = mlxchat("-m", *tiny, "stage=pretrain", "machine.log_every=1,2", f"outputs={outputs}")
    assert done.returncode == 0, done.stdout + done.stderr
    (first, second) = type(swept)(outputs).rows()
    assert first.keys() == second.keys() == {"job", "machine.log_every", "pretrain.val_bpb", "status"}


def test_sweep_accepts_lists_and_merges_equal_jobs(
    outputs: Path, tiny: tuple[str, ...], mlxchat: CommandLine, swept: Any
) -> None:
    done = mlxchat("-m", *tiny, "targets=[corpus],[corpus,tokenizer],[corpus]", f"outputs={outputs}")
    assert done.returncode == 0, done.stderr
    assert "job 1/2 targets=[corpus] is done already" in done.stdout
    assert "job 2/2 targets=[corpus,tokenizer] is done already" in done.stdout


def test_glob_gives_the_options_of_a_group(outputs: Path, tiny: tuple[str, ...], mlxchat: CommandLine) -> None:
    done = mlxchat("-m", *tiny, "stage=corpus", "machine=glob(c*)", f"outputs={outputs}")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"machine=(\w+) is done already", done.stdout) == ["cpu", "cuda_80gb"]


def test_invalid_value_refuses_the_whole_sweep(mlxchat: CommandLine, swept: Any) -> None:
    done = mlxchat("-m", "sft.num_epochs=1,0", "model=d2,d65", f"outputs={swept.outputs}")
    assert (done.returncode, done.stdout) == (2, "")
    assert "sft.num_epochs is 0, expected at least 1" in done.stderr
    assert 'model has no option "d65"' in done.stderr
    assert not swept.outputs.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hydra/launcher=joblb", "seed=1,2"], 'hydra/launcher has no option "joblb".* Did you mean "joblib"?'),
        (["hydra/launcher=slurm", "seed=1,2"], 'no option "slurm".* For SLURM and Ray: executor=slurm'),
        (["hydra.launcher.n_job=2", "seed=1,2"], "Hydra's settings: Could not override 'hydra.launcher.n_job'"),
        (["hydra/sweeper=optun", "seed=1,2"], "hydra/sweeper has no option.*For a search: sweep=tpe"),
        (["hydra.sweep.dir=${nothing}", "seed=1,2"], "Hydra's settings: .*nothing"),
        (["seed=interval(1,2)"], "to search an interval use sweep=tpe"),
        (["sweep=tpa", "seed=1,2"], "has no option"),
        (["model=d65", "seed=1,2"], "Did you mean"),
        (["sweep.metric=bpb", "seed=1,2"], "expected STEP.METRIC"),
        (["seed=glob(*)"], "seed is no group. List the values: seed=A,B"),
        (["model=glob(x*)"], "matches none of the options of model: d1, "),
        (["sweep.direction=minimise", "seed=1,2"], 'Did you mean "minimize"'),
        (["--nothing", "seed=1,2"], "unrecognized arguments: --nothing"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_refused_before_anything_is_written(
    arguments: list[str], message: str, swept: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlxchat.cli import main

    with pytest.raises(SystemExit) as caught:
        main(["-m", *arguments, f"outputs={swept.outputs}"])
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert re.search(message, output.err), output.err
    assert not swept.outputs.exists()


@pytest.mark.slow
def test_sweep_sorts_by_metric_and_direction(
    outputs: Path, tiny: tuple[str, ...], mlxchat: CommandLine, swept: Any
) -> None:
    settings = ["stage=pretrain", "pretrain.num_iterations=1,2", "sweep.direction=maximize"]
    done = mlxchat("-m", *tiny, *settings, f"outputs={outputs}")
    assert done.returncode == 0, done.stderr
    numbers = [row["pretrain.val_bpb"] for row in type(swept)(outputs).rows()]
    assert numbers == sorted(numbers, reverse=True)


def test_users_file_can_define_the_sweep(
    outputs: Path, tiny: tuple[str, ...], mlxchat: CommandLine, swept: Any, tmp_path: Path
) -> None:
    text = "# @package _global_\ndefaults: [smoke]\nhydra: {sweeper: {params: {tokenizer.vocab_size: '300,310'}}}\n"
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "sizes.yaml").write_text(text)
    settings = [item for item in tiny if not item.startswith(("experiment=", "tokenizer.vocab_size="))]
    command = ["--config-dir", tmp_path / "mine", "experiment=sizes", *settings, "stage=tokenizer"]
    done = mlxchat("-m", *command, f"outputs={outputs}")
    assert done.returncode == 0, done.stderr
    assert sorted(row["tokenizer.vocab_size"] for row in type(swept)(outputs).rows()) == [300, 310]


@pytest.mark.slow
def test_options_of_a_users_folder_are_swept(
    outputs: Path, tiny: tuple[str, ...], mlxchat: CommandLine, swept: Any, tmp_path: Path
) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "own.yaml").write_text("defaults: [d2]\nname: own\n")
    settings = ["--config-dir", tmp_path / "mine", "stage=tokenizer", "model=own,d2"]
    done = mlxchat("-m", *tiny, *settings, f"outputs={outputs}")
    assert done.returncode == 0, done.stderr
    assert json.loads((type(swept)(outputs).folder / "table.json").read_text())[0]["model"] in ("own", "d2")


@pytest.mark.slow
def test_sweep_over_sizes_reports_a_fit(mlxchat: CommandLine, tmp_path: Path) -> None:
    settings = ["-m", "experiment=smoke", "stage=pretrain", "model=d2,d4,d6", "model.aspect_ratio=16"]
    settings += ["model.head_width=16", "pretrain.num_iterations=4", "pretrain.eval_tokens=2048"]
    done = mlxchat(*settings, f"outputs={tmp_path / 'outputs'}", timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "outputs" / "multirun").iterdir()
    assert f"report: {folder / 'report.html'}" in done.stdout
    picture = (folder / "report" / "scaling.svg").read_text()
    assert all(f">model=d{depth}<" in picture for depth in (2, 4, 6))
    words = (folder / "report.md").read_text()
    assert all(f"| model=d{depth} | {depth} |" in words for depth in (2, 4, 6))
    again = mlxchat("report", folder.name, f"outputs={tmp_path / 'outputs'}")
    assert again.returncode == 0, again.stderr
    assert (folder / "report.md").read_text() == words


def test_sweep_folder_may_use_resolvers() -> None:
    folder = "hydra.sweep.dir='/sweeps/${now:%Y}/${name}-${seed}'"
    found = HydraSettings.read([folder], ["experiment=smoke", "seed=7"], [])
    assert re.fullmatch(r"/sweeps/20\d\d/smoke-7", str(found.folder))


@pytest.mark.parametrize("setting", ["hydra.run.dir=x", "hydra.sweep.subdir=x", "hydra.job.chdir=true"])
def test_ignored_hydra_settings_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(setting)):
        read_sweep(["-m", "seed=1,2", setting])


def test_sweep_plan_counts_shared_steps_once(say: Any, tmp_path: Path) -> None:
    command = ["experiment=smoke", "stage=pretrain", "optimizer.matrix_lr=0.01,0.02", "model=d2,d4"]
    command += [f"outputs={tmp_path}/outputs"]
    text = say("plan", "-m", *command)
    assert re.search(r"shared by 4 jobs\n  corpus +run .*\n  tokenizer +run", text)
    assert len(re.findall(r"^job \d/4 optimizer.matrix_lr=0.0\d model=d\d\n  pretrain +run .*MB with", text, re.M)) == 4
    assert text.splitlines()[-1].startswith("4 jobs, 6 steps: 0 done, 6 to run")
    plan = json.loads(say("plan", "--json", *command, "-m"))
    assert [step["step"] for step in plan["shared"]] == ["corpus", "tokenizer"]
    assert [[step["shared"] for step in job["steps"]] for job in plan["jobs"]] == [[True, True, False]] * 4
    assert plan["estimate"]["unknown"] == 6
    say("plan", "-m", "--exit-code", *command, code=3)
    assert 'Did you mean "optimizer.matrix_lr"' in say("plan", "-m", "optimizer.matrix_l=1,2", code=2)
    assert list(tmp_path.iterdir()) == []


def test_plan_of_a_finished_sweep_is_done(five: Any, say: Any) -> None:
    _outputs, _, command = five
    more = say("plan", *command[:-2], f"{command[-2]},0.09", command[-1])
    assert len(re.findall(r"^job \d/6 .* is done$", more, re.M)) == 5
    assert re.search(r"job 6/6 optimizer.matrix_lr=0.09\n  pretrain +run .*~\d", more)
    assert more.splitlines()[-1].startswith("6 jobs, 8 steps: 7 done, 1 to run; together ~")
