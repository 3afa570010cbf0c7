"""Pretrain: teach the base model to predict text, one token at a time.

Counterpart of nanochat's scripts/base_train.py. Settings: `PretrainConfig` of config/schema.py.
"""

import math
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from mlxchat.planning.forecast import LOOP_METRICS, memory, problems
from mlxchat.runner.context import Context
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.stage import CHECKPOINT_FILES, Metric, Stage


def estimates_core(step: PlannedStep, *, whole: bool = True) -> bool:
    core = step.config.pretrain.core
    return core is not None and (core.tasks is None or not core.tasks) == whole


def has_target(step: PlannedStep) -> bool:
    return step.config.pretrain.target_bpb is not None


def may_end_early(step: PlannedStep) -> bool:
    return has_target(step) or step.config.pretrain.max_seconds is not None


stage = Stage(
    version=6,
    inputs={"corpus": "corpus", "tokenizer": "tokenizer"},
    produces="checkpoint",
    outputs=["model.safetensors", *CHECKPOINT_FILES],
    reads=["model", "architecture", "optimizer", "pretrain", "training"],
    metrics=[
        Metric("val_bpb", "minimize", curve=True),
        Metric("val_perplexity", "minimize", curve=True),
        Metric("loss", "minimize", curve=True),
        Metric("core_estimate", "maximize", curve=True, when=estimates_core, needs="core=nanochat"),
        Metric("core_estimate_stderr", when=estimates_core, needs="core=nanochat"),
        Metric(
            "core_tasks_estimate", "maximize", when=partial(estimates_core, whole=False), needs="pretrain.core.tasks"
        ),
        Metric("reached_target", "maximize", when=has_target, needs="pretrain.target_bpb"),
        Metric("iterations", "minimize", when=may_end_early, needs="pretrain.target_bpb or pretrain.max_seconds"),
        Metric("seconds_to_target", "minimize", when=has_target, needs="pretrain.target_bpb"),
        Metric("epochs"),
        Metric("cropped_tokens", "minimize"),
        Metric("cropped_frac", "minimize"),
        *LOOP_METRICS,
    ],
    uses_gpu=True,
    format="base",
    label=lambda config: config.model.name,
    memory=memory,
    problems=problems,
)


def run(ctx: Context) -> None:
    from mlxchat.data.packing import RowBatches, RowStream, take_validation
    from mlxchat.data.tokenizer import Tokenizer
    from mlxchat.data.tokens import open_documents
    from mlxchat.engine.generate import Engine, continue_prompts
    from mlxchat.evals.bpb import text_loss
    from mlxchat.model.checkpoint import save_checkpoint
    from mlxchat.model.gpt import GPT
    from mlxchat.model.parameters import init_weights
    from mlxchat.model.sizes import sizes_of
    from mlxchat.ops.device import prepare_machine
    from mlxchat.optim.optimizer import Optimizer
    from mlxchat.planning.forecast import memory
    from mlxchat.planning.horizon import derive_hyperparameters, derive_numbers
    from mlxchat.planning.memory import choose_micro_batch
    from mlxchat.training.loop import derived_after, fit
    from mlxchat.training.monitor import Observation, observe_core
    from mlxchat.training.step import make_step

    config, rates, machine = ctx.config.pretrain, ctx.config.optimizer, ctx.config.machine
    dtype = prepare_machine(machine)
    tokenizer = Tokenizer.load(ctx.inputs["tokenizer"])
    sizes = sizes_of(ctx.config.model, ctx.config.architecture, tokenizer.vocab_size)
    derived = derive_hyperparameters(ctx.config, sizes)
    row_tokens = config.batch.row_tokens
    rows_per_iteration = derived.batch_tokens // row_tokens
    micro_batch = choose_micro_batch(ctx, memory(ctx.config, ctx.stage, sizes))
    numbers = {**derive_numbers(derived, sizes, micro_batch.tokens), **micro_batch.numbers()}
    horizon = ("num_iterations", "total_tokens") if config.max_seconds is None else ()
    ctx.derive(numbers, shown=("num_parameters", "tokens_per_iteration", *horizon))
    model = GPT(sizes)
    init_weights(model, ctx.seed("weights"))
    scaled: dict[str, Any] = {"batch_lr_scale": derived.batch_lr_scale, "weight_decay": derived.weight_decay}
    optimizer = Optimizer(model, rates, width=sizes.width, lr_frac=config.schedule.init_lr_frac, **scaled)

    def read_rows(split: str, *, once: bool = False) -> RowStream:
        return RowStream(
            config.packing,
            open_documents(ctx, split, tokenizer, once=once),
            row_tokens=row_tokens,
            buffer_size=1000,  # nanochat's
            batch_rows=rows_per_iteration,
        )

    held_out = read_rows("validation", once=True)
    validation = take_validation(held_out, config.eval_tokens, "pretrain.eval_tokens")
    num_iterations = derived.num_iterations
    target = config.target_bpb
    target_every = None if target is None else config.keep_every or -(-num_iterations // 20)
    facts = {"stage": "pretrain", "format": "base", "pretrain_batch_tokens": derived.batch_tokens}

    def save(folder: Path) -> None:
        save_checkpoint(folder, model, tokenizer, facts)

    def validate(iteration: int) -> dict[str, float]:
        found = text_loss(model, validation, tokenizer.token_bytes, micro_tokens=micro_batch.tokens, team=ctx.team)
        return {"val_bpb": found.bits_per_byte, "val_perplexity": found.perplexity}

    def is_enough(done: int, numbers: dict[str, float]) -> bool:
        if target is None or target_every is None or done % target_every:
            return False
        return numbers.get("val_bpb", math.inf) <= target

    def sample(iteration: int) -> dict[str, float]:
        engine = Engine(model, tokenizer, dtype=dtype, max_rows=micro_batch.sampled_rows, team=ctx.team)
        for prompt, text in continue_prompts(engine, config.prompts, config.sample_tokens, seed=ctx.seed("samples")):
            ctx.records("samples").append({"iteration": iteration, "prompt": prompt, "text": text})
        return {}

    with closing(read_rows("train")) as rows:
        batches = RowBatches(rows, rows_per_iteration)
        settings = {"micro_tokens": micro_batch.tokens, "dropout": ctx.config.architecture.dropout}
        done = fit(
            ctx,
            config,
            make_step(ctx, model, optimizer, **settings),
            batches,
            num_iterations=num_iterations,
            observations=[
                Observation(run=validate, every=(config.eval_every, config.save_every, target_every)),
                *observe_core(ctx, config, model, tokenizer),
                Observation(run=sample, every=(config.sample_every,), at_end=False),
            ],
            save=save,
            save_every=config.save_every,
            max_seconds=config.max_seconds,
            is_enough=is_enough,
        )
    sample(done)  # with the weights that the artifact has
    if done < num_iterations:
        ctx.derived = derived_after(done, num_iterations, ctx.derived)
    if target is not None or config.max_seconds is not None:
        ctx.metrics["iterations"] = done
    if target is not None:
        ctx.metrics |= {
            "reached_target": float(ctx.metrics["val_bpb"] <= target),
            "seconds_to_target": done * derived.batch_tokens / ctx.metrics["tokens_per_second"],
        }
    ctx.metrics |= batches.counts()
    save(ctx.out)
