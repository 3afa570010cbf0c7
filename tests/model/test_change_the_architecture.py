"""The diff of docs/internals/change_the_architecture.md, applied to a copy of the package that then trains."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "internals" / "change_the_architecture.md").read_text(encoding="utf-8")

TRAIN = """
import json, sys
import mlxchat
import mlx.core as mx
mx.set_default_device(mx.cpu)
import numpy as np
from mlxchat.composition.compose import compose_config
from mlxchat.model.gpt import GPT, init_weights
from mlxchat.model.sizes import sizes_of
from mlxchat.optim.optimizer import Optimizer
from mlxchat.optim.optimizer import Rates
from mlxchat.training.batches import mean_batch
from mlxchat.training.step import TrainStep

losses = {}
for overrides in json.loads(sys.argv[1]):
    config = compose_config(["model=d1", *overrides]).config
    model = GPT(sizes_of(config.model, config.architecture, 64))
    init_weights(model, 0)
    step = TrainStep(model, Optimizer(model, config.optimizer, width=64), micro_tokens=64, dtype=mx.float32)
    ids = np.random.default_rng(0).integers(0, 64, (2, 33)).astype(np.int32)
    batch = mean_batch([(row[:-1], row[1:]) for row in ids])
    losses[" ".join(overrides)] = [step(batch, Rates(1.0, 0.9, 1.0), index)[0] for index in range(3)]
print(mlxchat.__file__)
print(json.dumps(losses))
"""


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the page's diff in it."""
    copy = tmp_path_factory.mktemp("changed")
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    (diff,) = re.findall(r"```diff\n(.*?)```", PAGE, re.S)
    subprocess.run(["git", "apply", "-"], cwd=copy, input=diff, text=True, check=True)
    return copy


def test_diff_applies_with_git(changed):
    assert "self.choices[sizes.activation]" in (changed / "src" / "mlxchat" / "model" / "gpt.py").read_text("utf-8")


@pytest.mark.slow
def test_changed_copy_trains_with_the_new_activation(changed):
    overrides = [[], ["architecture.activation=silu"]]
    environ = {**os.environ, "PYTHONPATH": str(changed / "src"), "MLXCHAT_COMPOSED_CACHE": "off"}
    command = [sys.executable, "-c", TRAIN, json.dumps(overrides)]
    ended = subprocess.run(command, cwd=changed, env=environ, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    where, losses = ended.stdout.splitlines()
    assert Path(where).is_relative_to(changed)
    after = [values[1:] for values in json.loads(losses).values()]
    assert all(values[-1] < 4.2 for values in after), "ln 64 = 4.16 is the loss of guessing"
    assert after[0] != after[1]
