"""Looks at a table: a branch of its own beside the training."""

from mlxchat.runner.stage import Stage
from stubs import score

stage = Stage(version=1, inputs={"table": "table"}, produces="scores", outputs=["scores.json"], reads=["score"])


def run(ctx):
    score.look(ctx, ctx.inputs["table"] / "table.txt")
