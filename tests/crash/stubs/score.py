"""Looks at a model, as eval does; settings make it fail or take its time."""

import time

from mlxchat.runner.stage import Stage
from stubs.source import count_execution

stage = Stage(version=1, inputs={"model": "model"}, produces="scores", outputs=["scores.json"], reads=["score"])


def run(ctx):
    look(ctx, ctx.inputs["model"] / "model.bin")


def look(ctx, path):
    count_execution(ctx)
    if ctx.step in ctx.config.score.failing:
        raise ValueError(f"{ctx.step} cannot be scored")
    until = time.monotonic() + ctx.config.score.seconds
    while time.monotonic() < until:
        if ctx.should_stop():
            raise ctx.stop("half of it")
        time.sleep(0.005)
    (ctx.out / "scores.json").write_text(f'{{"size": {path.stat().st_size}}}\n')
