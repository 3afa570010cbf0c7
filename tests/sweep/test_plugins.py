"""Sweepers and launchers of Hydra plugins."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from kit.commands import CommandLine

PLUGINS = """
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins
    from hydra.core.utils import run_job
    from hydra.plugins.launcher import Launcher
    from hydra.plugins.sweeper import Sweeper
    from omegaconf import open_dict


    class Climb(Sweeper):
        def setup(self, *, hydra_context, task_function, config):
            self.launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

        def sweep(self, arguments):
            size, best = 280, 0.0
            for number in range(3):
                job = [*arguments, f"tokenizer.vocab_size={size}"]
                (found,) = self.launcher.launch([job], initial_job_idx=number)
                assert found.return_value > best, "each result comes back"
                best, size = found.return_value, size + 20


    class Backwards(Launcher):
        def setup(self, *, hydra_context, task_function, config):
            self.context, self.task, self.config = hydra_context, task_function, config

        def launch(self, job_overrides, initial_job_idx):
            found = {}
            for place, overrides in reversed(list(enumerate(job_overrides, initial_job_idx))):
                config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
                with open_dict(config):
                    config.hydra.job.id, config.hydra.job.num = str(place), place
                found[place] = run_job(
                    hydra_context=self.context, task_function=self.task, config=config,
                    job_dir_key="hydra.sweep.dir", job_subdir_key="hydra.sweep.subdir",
                )
            return [found[place] for place in sorted(found)]


    for group, kind in (("sweeper", Climb), ("launcher", Backwards)):
        node = {"_target_": f"hydra_plugins.toys.{kind.__name__}"}
        ConfigStore.instance().store(group=f"hydra/{group}", name=kind.__name__.lower(), node=node)
"""


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds the plugins."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "hydra_plugins").mkdir()
    (folder / "hydra_plugins" / "toys.py").write_text(dedent(PLUGINS))
    return {"PYTHONPATH": str(folder)}


def test_plugin_sweeper_receives_the_metric(
    environ: dict[str, str], outputs: Path, tiny: tuple[str, ...], mlxchat: CommandLine, swept: Any
) -> None:
    settings = ["stage=tokenizer", "hydra/sweeper=climb", "sweep.metric=tokenizer.bytes_per_token"]
    done = mlxchat("-m", *tiny, *settings, f"outputs={outputs}", environ=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = swept.__class__(outputs).rows()
    assert [row["tokenizer.vocab_size"] for row in rows] == [320, 300, 280], "the most bytes per token first"
    compared = mlxchat("compare", swept.__class__(outputs).folder.name, f"outputs={outputs}")
    assert "tokenizer.vocab_size=320" in compared.stdout


def test_plugin_launcher_runs_the_jobs(
    environ: dict[str, str], outputs: Path, tiny: tuple[str, ...], mlxchat: CommandLine, swept: Any
) -> None:
    settings = ["stage=tokenizer", "hydra/launcher=backwards", "tokenizer.vocab_size=280,320"]
    folder = "hydra.sweep.dir=${outputs}/mine/${hydra:job.name}"
    done = mlxchat("-m", *tiny, *settings, folder, f"outputs={outputs}", environ=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (done.stdout.index(f"job {number}/2 tokenizer.vocab_size=") for number in (1, 2))
    assert second < first
    (place,) = (outputs / "mine").iterdir()
    assert {path.name for path in place.iterdir()} >= {"table.md", "sweep.json", "report.html"}
    assert not (place / "multirun.yaml").exists()


def test_plugin_sweeper_needs_a_metric(
    environ: dict[str, str], tiny: tuple[str, ...], mlxchat: CommandLine, tmp_path: Path
) -> None:
    done = mlxchat("-m", *tiny, "hydra/sweeper=climb", f"outputs={tmp_path}/outputs", environ=environ)
    assert done.returncode == 2
    assert "hydra/sweeper=climb needs a metric: give sweep.metric=STEP.METRIC" in done.stderr
    assert not (tmp_path / "outputs").exists()
