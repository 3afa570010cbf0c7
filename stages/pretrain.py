"""Pretrain: teach the base model to predict text, one token at a time.

Counterpart of nanochat's scripts/base_train.py. Options: conf/settings/pretrain.yaml.
"""

from contextlib import nullcontext
from pathlib import Path

from mlxchat.data.packing import RowStream, pack_documents, take_rows, take_validation
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.tokens import open_documents
from mlxchat.engine.generate import Engine
from mlxchat.evals.bpb import text_loss
from mlxchat.evals.rank_model import text_model
from mlxchat.evals.samples import continue_prompts
from mlxchat.model.checkpoint import save_checkpoint
from mlxchat.model.gpt import GPT, init_weights
from mlxchat.model.sizes import sizes_of
from mlxchat.ops.device import prepare_machine
from mlxchat.optim.optimizer import Optimizer
from mlxchat.planning.horizon import derive_hyperparameters, derive_numbers
from mlxchat.planning.memory import choose_micro_batch, forward_tokens
from mlxchat.runner.context import Context
from mlxchat.training.batches import RowBatches
from mlxchat.training.best import Best
from mlxchat.training.forecast_pretrain import memory
from mlxchat.training.hooks import core_hooks, train_text_hooks
from mlxchat.training.loop import Hook, Target, derived_after, fit

VERSION = 4
CONFIG = ["model", "architecture", "optimizer", "pretrain", "training"]
INPUTS = {"corpus": "corpus", "tokenizer": "tokenizer"}
PRODUCES = "checkpoint"
FORECAST = "mlxchat.training.forecast_pretrain"
FORMAT = "base"
OUTPUTS = ["model.safetensors", "config.json", "checkpoint.json", "tokenizer.json", "tokenizer_config.json"]
METRICS = {
    "val_bpb": "minimize while training",
    "val_perplexity": "minimize while training",
    "loss": "minimize while training",
    "core_estimate": "maximize while training if pretrain.core and not pretrain.core.tasks",
    "core_estimate_stderr": "neither if pretrain.core and not pretrain.core.tasks",
    "core_tasks_estimate": "maximize if pretrain.core.tasks",
    "train_bpb": "minimize if pretrain.train_bpb_tokens",
    "best_iteration": "neither if pretrain.keep=best",
    "last_val_bpb": "minimize if pretrain.keep=best",
    "last_val_perplexity": "minimize if pretrain.keep=best",
    "reached_target": "maximize if pretrain.has_target",
    "iterations": "minimize if pretrain.has_target",
    "seconds_to_target": "minimize if pretrain.has_target",
    "epochs": "neither",
    "cropped_tokens": "minimize",
    "cropped_frac": "minimize",
    "skipped_iterations": "minimize if training.on_nan=skip",
    "tokens_per_second": "maximize",
    "data_wait_frac": "minimize",
}
RESOURCES = ["gpu"]
LABEL = "model.name"


def run(ctx: Context) -> None:
    config, rates, machine = ctx.config.pretrain, ctx.config.optimizer, ctx.config.machine
    dtype = prepare_machine(machine)
    tokenizer = Tokenizer.load(ctx.inputs["tokenizer"])
    sizes = sizes_of(ctx.config.model, ctx.config.architecture, tokenizer.vocab_size)
    derived = derive_hyperparameters(ctx.config, sizes)
    row_tokens = config.batch.row_tokens
    rows_per_iteration = derived.batch_tokens // row_tokens
    micro_batch = choose_micro_batch(ctx, memory(ctx.config, ctx.stage, sizes))
    numbers = {**derive_numbers(derived, sizes, micro_batch.tokens), **micro_batch.numbers()}
    ctx.derive(numbers, shown=("num_parameters", "tokens_per_iteration", "num_iterations", "total_tokens"))
    model = GPT(sizes)
    init_weights(model, ctx.seed("weights"))
    optimizer = Optimizer(
        model,
        rates,
        width=sizes.width,
        lr_frac=config.schedule.init_lr_frac,
        batch_lr_scale=derived.batch_lr_scale,
        weight_decay=derived.weight_decay,
    )

    def read_rows(split: str, *, once: bool = False) -> RowStream:
        return pack_documents(
            config.packing if split == "train" or config.packing == "stream" else "best_fit",
            open_documents(ctx, split, tokenizer, once=once),
            row_tokens=row_tokens,
            buffer_documents=config.packing_buffer_documents,
            batch_rows=rows_per_iteration,
            bos=tokenizer.bos,
        )

    validation = take_validation(
        read_rows("validation", once=True),
        row_tokens=row_tokens,
        tokens=config.eval_tokens,
        setting="pretrain.eval_tokens",
    )

    num_iterations, best, target = derived.num_iterations, None, None
    candidate_every = config.keep_every or -(-num_iterations // 20)
    if config.keep == "best":
        best = Best(every=candidate_every, basis=config.eval_tokens)
    if config.target_bpb is not None:
        target = Target(metric="val_bpb", value=config.target_bpb, every=candidate_every)
    elif config.target_core is not None:
        target = Target(metric="core_estimate", value=config.target_core, every=candidate_every, choose=max)
    candidates = candidate_every if best or target else None
    facts: dict[str, object] = {"stage": "pretrain", "format": "base", "pretrain_batch_tokens": derived.batch_tokens}

    def save(folder: Path) -> None:
        save_checkpoint(folder, model, tokenizer, facts)

    def validate(iteration: int) -> dict[str, float]:
        micro_tokens = forward_tokens(machine, sizes, training_peak_bytes=micro_batch.predicted_peak_bytes)
        found = text_loss(text_model(ctx.team, model), validation, tokenizer.token_bytes, micro_tokens=micro_tokens)
        return {"val_bpb": found.bits_per_byte, "val_perplexity": found.perplexity}

    def sample(iteration: int) -> dict[str, float]:
        # At the end, what the artifact's weights say.
        ends = iteration == num_iterations or "reached_target" in ctx.metrics
        with best.in_place(model) if best is not None and ends else nullcontext():
            texts = continue_prompts(
                Engine(model, tokenizer, trained=True, dtype=dtype, max_rows=micro_batch.sampled_rows, team=ctx.team),
                config.prompts,
                config.sample_tokens,
                temperature=config.sample_temperature,
                top_k=config.sample_top_k,
                seed=ctx.seed("samples"),
            )
        for prompt, text in texts:
            ctx.records("samples").append({"iteration": iteration, "prompt": prompt, "text": text})
        return {}

    with RowBatches(read_rows("train"), rows_per_iteration) as batches:
        fit(
            ctx,
            model,
            optimizer,
            batches,
            num_iterations=num_iterations,
            schedule=config.schedule,
            hooks=[
                Hook(run=validate, every=config.eval_every, also_every=(candidates, config.save_every)),
                *core_hooks(ctx, config, model, tokenizer, also_every=candidate_every if config.target_core else None),
                Hook(run=sample, every=config.sample_every),
                *train_text_hooks(
                    ctx, config, model, tokenizer, lambda count: take_rows(read_rows("train", once=True), count)
                ),
            ],
            micro_tokens=micro_batch.tokens,
            extends=ctx.inputs.get("extends"),
            keep_state=config.save_training_state,
            best=best,
            target=target,
            save=save,
            save_every=config.save_every,
            dropout=ctx.config.architecture.dropout,
        )
    if target is not None:  # which may have ended it: what is said of the training is what was made
        ctx.derived = derived_after(int(ctx.metrics["iterations"]), num_iterations, ctx.derived)
    ctx.metrics |= batches.counts()
    if best is not None:
        facts["best_iteration"] = best.iteration
    save(ctx.out)
