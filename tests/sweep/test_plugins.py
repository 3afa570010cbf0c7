"""Sweepers and launchers of Hydra plugins."""

import json
import re
from textwrap import dedent

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
            for number in (0, 2):
                jobs = [[*arguments, f"tokenizer.vocab_size={size + more}"] for more in (0, 20)]
                found = [each.return_value for each in self.launcher.launch(jobs, initial_job_idx=number)]
                assert best < found[0] < found[1], "each result comes back"
                best, size = found[1], size + 40


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


def test_plugin_sweeper_and_launcher_run_the_jobs(swept, tiny, mlxchat, tmp_path):
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "toys.py").write_text(dedent(PLUGINS))
    settings = ["stage=tokenizer", "hydra/sweeper=climb", "hydra/launcher=backwards", f"outputs={swept.outputs}"]
    settings += ["sweep.metric=tokenizer.bytes_per_token", "hydra.sweep.dir=${outputs}/mine/${hydra:job.name}"]
    done = mlxchat("-m", *tiny, *settings, environ={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"── job (\d) done", done.stdout) == ["2", "1", "4", "3"]
    (folder,) = (swept.outputs / "mine").iterdir()
    rows = json.loads((folder / "table.json").read_text())
    assert [row["tokenizer.vocab_size"] for row in rows] == [340, 320, 300, 280], "the most bytes per token first"
    assert {path.name for path in folder.iterdir()} >= {"table.md", "sweep.json", "report.html"}
    assert not (folder / "multirun.yaml").exists()
