"""Changes of the model in a copy of the package: what trains, chats, is evaluated and exported follows gpt.py alone."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "internals" / "change_the_architecture.md").read_text(encoding="utf-8")
# A gated unit: one matrix more, with its initial weights and its count.
GATED = {
    "gpt.py": [
        ("self.c_fc = Linear(", "self.c_gate = Linear(sizes.width, 4 * sizes.width)\n        self.c_fc = Linear("),
        ("squared_relu(self.c_fc(x))", "nn.silu(self.c_gate(x)) * self.c_fc(x)"),
    ],
    "initial.py": [('"c_v" | "c_fc"', '"c_v" | "c_gate" | "c_fc"')],
    "sizes.py": [("8 * width * width", "12 * width * width")],
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    left_out = (".git", ".venv", "__pycache__", "*.egg-info", "tests", "docs", "outputs", ".*_cache")
    return shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(*left_out), symlinks=True)


def test_diff_of_the_page_applies_with_git(copy):
    (diff,) = re.findall(r"```diff\n(.*?)```", PAGE, re.S)
    subprocess.run(["git", "apply", "-"], cwd=copy, input=diff, text=True, check=True)


COMPARE = """
import mlxchat; import numpy as np, mlx.core as mx, mlx_lm; from pathlib import Path
from mlxchat.model.checkpoint import load_checkpoint
ids, (ours, *_) = mx.array([[1, 2, 3, 4]]), load_checkpoint(next(Path("outputs/store").glob("sft-*")))
theirs, _ = mlx_lm.load("out", trust_remote_code=True)
assert "c_gate" in theirs.layers[0].mlp
np.testing.assert_allclose(np.asarray(theirs(ids)), np.asarray(ours(ids)), atol=1e-3)
"""


@pytest.mark.slow
def test_gated_unit_is_trained_answered_evaluated_and_exported(copy, tmp_path):
    pytest.importorskip("mlx_lm")
    for name, changes in GATED.items():
        path = copy / "src" / "mlxchat" / "model" / name
        for old, new in changes:
            text = path.read_text("utf-8")
            assert old in text
            path.write_text(text.replace(old, new), "utf-8")

    def python(*arguments: str, code: int = 0) -> str:
        environ = {**os.environ, "PYTHONPATH": str(copy / "src")}
        ended = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
        )
        assert ended.returncode == code, ended.stderr
        return ended.stdout + ended.stderr

    python("-m", "mlxchat", "experiment=smoke", "stage=sft")
    python("-m", "mlxchat", "chat", "sft", "-p", "the cat", "--max-tokens", "8", "--temperature", "0")
    assert "bpb" in python("-m", "mlxchat", "eval", "sft", "--task", "bpb")
    python("-m", "mlxchat", "export", "sft", "--to", "mlx", "out")
    python("-c", COMPARE)
    assert "Use --to mlx" in python("-m", "mlxchat", "export", "sft", "--to", "hf", "hf", code=2)
