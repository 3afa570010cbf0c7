"""Looks at a table: a branch of its own beside the training."""

from stubs import score

VERSION = 1
CONFIG = ["score"]
INPUTS = {"table": "table"}
PRODUCES = "scores"
OUTPUTS = ["scores.json"]


def run(ctx):
    score.look(ctx, ctx.inputs["table"] / "table.txt")
