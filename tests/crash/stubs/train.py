"""Iterates, saves, continues and uses an artifact that others share, as trainings do."""

import time

import numpy as np

from mlxchat.runner.stage import Stage
from mlxchat.store.files import crash_point
from mlxchat.training.state import read_newest, write_save
from stubs.source import count_execution

stage = Stage(
    version=1,
    inputs={"text": "text", "table": "table"},
    produces="model",
    outputs=["model.bin"],
    reads=["train"],
    uses_gpu=True,
)


def run(ctx):
    count_execution(ctx)
    settings = ctx.config.train
    place = ctx.encoded(version=1, label="all", identity={"lines": 1}, make=lambda folder: encode(ctx, folder))
    encoded = np.frombuffer((place / "encoded.bin").read_bytes(), dtype=np.uint8)
    found = read_newest(ctx.work)
    weights, done = np.zeros(64), 0
    if found is not None:
        weights, done = found[0]["weights"], found[1]["iteration"]
    ctx.rewind_records(done)
    while done < settings.iterations:
        weights = (
            weights * 0.9
            + np.random.default_rng([done, ctx.seed("noise")]).normal(size=64)
            + encoded[done % len(encoded)]
        )
        done += 1
        crash_point("train.iteration")
        ctx.log({"iteration": done, "norm": float(np.linalg.norm(weights)), "elapsed_seconds": time.monotonic()})
        time.sleep(settings.pause)
        if done == settings.iterations // 2:
            ctx.publish(done, lambda folder: (folder / "model.bin").write_bytes(weights.tobytes()), {})  # noqa: B023
        ctx.check_lock()
        write_save(ctx.work, done, {"weights": weights}, {"rate": 0.5})
        if ctx.should_stop() and done < settings.iterations:
            raise ctx.stop(f"iteration {done} of {settings.iterations}")
    crash_point("train.finished")
    (ctx.out / "model.bin").write_bytes(weights.tobytes())
    ctx.metrics["norm"] = float(np.linalg.norm(weights))


def encode(ctx, folder):
    (folder / "encoded.bin").write_bytes((ctx.inputs["table"] / "table.txt").read_bytes())
    return {"lines": 1}
