"""Iterates and saves with all ranks at every iteration, as trainings do, and computes next to nothing."""

import time

import numpy as np

from mlxchat.store.crash import crash_point
from mlxchat.training.state import read_newest, write_save
from stubs.source import count_execution

VERSION = 1
CONFIG = ["train"]
INPUTS = {"text": "text"}
PRODUCES = "model"
OUTPUTS = ["model.bin"]
RESOURCES = ["gpu"]


def run(ctx):
    from mlxchat.distributed.ranks import begin_step

    count_execution(ctx)
    # A function of mlxchat that all ranks may be asked to call; what is sent along travels through MLX's ring.
    machine = {
        "device": "cpu", "compute_dtype": ctx.config.train.dtype, "memory_limit_bytes": None, "cache_limit_bytes": None,
        "wired_limit_bytes": None, "blas_threads": 1,
    }  # fmt: skip
    order = {"neighbours": [1, 1, 1], "machine": machine}
    found = read_newest(ctx.work)
    total, done = (found[0]["total"], found[1]["iteration"]) if found else (np.zeros(8), 0)
    ctx.rewind_records(done)
    while done < ctx.config.train.iterations:
        numbers = np.random.default_rng(done).integers(0, 9, size=8)
        if ctx.team is not None:
            ctx.team.call(begin_step, order, {"numbers": numbers.astype(np.float32)})
        total = total + numbers
        done += 1
        crash_point("train.iteration")
        ctx.log({"iteration": done, "total": float(total.sum())})
        write_save(ctx.work, done, {"total": total}, {})
        time.sleep(ctx.config.train.pause)
        if ctx.should_stop() and done < ctx.config.train.iterations:
            raise ctx.stop(f"iteration {done} of {ctx.config.train.iterations}")
    (ctx.out / "model.bin").write_bytes(total.tobytes())
