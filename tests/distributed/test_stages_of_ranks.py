"""Stages evaluate and generate on all ranks, with the results of one process."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ASKING = [
    *(ROOT / "stages" / f"{name}.py" for name in ("pretrain", "rl", "eval")),
    ROOT / "src" / "mlxchat" / "training" / "finetune.py",
]
LOSSES = {"text_loss", "mean_loss", "bits_per_byte"}


def called(path: Path) -> list[tuple[str, ast.Call]]:
    """Return the calls of plain names in a file."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return [(call.func.id, call) for call in calls if isinstance(call.func, ast.Name)]


@pytest.mark.parametrize("path", ASKING, ids=lambda path: path.stem)
def test_stages_use_all_ranks_for_evaluations(path):
    """Otherwise they would silently compute on rank 0 alone."""
    names = dict(called(path))
    assert not names.keys() & {"OwnModel"}
    assert names.keys() & {"Engine", "language_model", "text_model"}
    for name, call in called(path):
        if name in LOSSES:
            assert ast.unparse(call.args[0]) in ("text_model(ctx.team, model)", "told"), ast.unparse(call)
        if name in ("language_model", "text_model"):
            assert ast.unparse(call.args[0]) == "ctx.team", ast.unparse(call)
        if name in ("Engine", "PolicyScores"):
            assert "team=ctx.team" in ast.unparse(call)


def results(outputs: Path) -> dict[str, Any]:
    """Return scores and rewards of RL's answers, by step."""
    latest = outputs / "refs" / "latest"
    found: dict[str, Any] = {name: json.loads((latest / name / "scores.json").read_text()) for name in ("eval_base",)}
    records = [json.loads(line) for line in (latest / "rl" / "rollouts.jsonl").read_text().splitlines()]
    return found | {"rl": [[each["question"], each["output"], each["reward"]] for each in records]}


def test_rl_and_evaluations_equal_one_process(mlxchat, tiny, outputs, rows_sum_alike):
    before = results(outputs)
    done = mlxchat(*tiny, f"outputs={outputs}", "machine.num_processes=2", "force=[rl, eval_base]", timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    after = results(outputs)
    assert len(after["rl"]) == len(before["rl"]) > 0
    bpb = [each["eval_base"].pop("bpb") for each in (before, after)]
    assert bpb[1] == pytest.approx(bpb[0], rel=1e-6)
    if rows_sum_alike:  # else float32 rounds in another order, which may change a draw
        assert after == before
