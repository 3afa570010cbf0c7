"""Training that continues from a checkpoint: adapters for all stages, conversations for midtrain and sft."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.config.schema import AdapterConfig, FinetuneConfig, OptimizerConfig
from mlxchat.data.mixture import Mixture, open_item
from mlxchat.data.packing import RowStream, ShuffledConversations, count_rows, pack_conversations, take_validation
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.tokens import Tokens, open_mixture
from mlxchat.errors import DataError
from mlxchat.evals.bpb import mean_loss
from mlxchat.evals.rank_model import text_model
from mlxchat.model.adapter_problems import adapter_sizes_of
from mlxchat.model.checkpoint import load_checkpoint, save_adapters, save_checkpoint
from mlxchat.model.gpt import GPT, lengthen_context, trained_parameters
from mlxchat.model.lora import adapters_of, attach_adapters
from mlxchat.ops.device import prepare_machine
from mlxchat.optim.optimizer import AdamWRule, Optimizer, adapter_rule
from mlxchat.planning.horizon import count_later_iterations, whole_rows
from mlxchat.planning.memory import choose_micro_batch, forward_tokens
from mlxchat.runner.context import Context
from mlxchat.training.batches import RowBatches
from mlxchat.training.forecast_finetune import describe
from mlxchat.training.hooks import suite_hooks
from mlxchat.training.loop import Hook, fit
from mlxchat.training.state import load_moments
from mlxchat.training.teacher import load_teacher


def finetune(ctx: Context, config: FinetuneConfig) -> None:
    """Train the input checkpoint on the mixture's conversations.

    Raises:
        DataError: the checkpoint lacks what the configuration needs.
    """
    checkpoint = ctx.inputs["checkpoint"]
    machine, rates = ctx.config.machine, rates_of(ctx.config.optimizer, clip_gradients=config.clip_gradients)
    dtype = prepare_machine(machine)
    model, tokenizer, facts = load_checkpoint(checkpoint)
    if config.context_tokens is not None:
        model = lengthen_context(model, config.context_tokens)
    rule = begin_adapters(ctx, config.adapter, model, dtype)
    optimizer = Optimizer(model, rates, width=model.sizes.width, lr_frac=config.schedule.init_lr_frac, adapter=rule)
    if config.warm_start:
        load_moments(checkpoint, optimizer)
    row_tokens = config.batch.row_tokens
    distillation = None
    if config.teacher.is_there:
        folder = ctx.inputs["teacher"] if config.teacher.artifact is not None else Path(config.teacher.path or "")
        distillation = load_teacher(config.teacher, folder, tokenizer, row_tokens=row_tokens, dtype=dtype)
    rows_per_iteration = _batch_tokens(ctx.stage, config, checkpoint, facts) // row_tokens
    order = config.mixture_order
    mixture = Mixture(config.mixture, seed=ctx.seed("mixture"), order=order, load=partial(open_item, ctx))
    encoded = open_mixture(ctx, "mixture", mixture, tokenizer)
    held_out_mixture = Mixture(config.validation, seed=ctx.data_seed("validation"), load=partial(open_item, ctx))

    def pack(conversations: Tokens, *, once: bool = False) -> RowStream:
        seed = ctx.seed("order") if once or order is None else None
        return pack_conversations(
            config.packing,
            ShuffledConversations(conversations, seed, mixture.name, once=once),
            batch_rows=rows_per_iteration,
            bos=tokenizer.bos,
            assistant_end=tokenizer.assistant_end,
            row_tokens=row_tokens,
            buffer_conversations=config.packing_buffer_conversations,
            train_on=config.train_on,
        )

    rows_per_epoch = count_rows(pack(encoded))
    num_iterations = count_later_iterations(config, rows_per_epoch, rows_per_iteration)
    validation = take_validation(
        pack(open_mixture(ctx, "validation", held_out_mixture, tokenizer), once=True),
        row_tokens=row_tokens,
        tokens=config.eval_tokens,
        setting=f"{ctx.stage}.eval_tokens",
    )
    # By length, since the padding that all rows of a batch end with is not computed.
    validation.sort(key=lambda row: int(np.flatnonzero(row[1] >= 0).max(initial=-1)))
    size = None if distillation is None else distillation.size
    described = describe(ctx.stage, config, ctx.config.optimizer, model.sizes, rows_per_iteration, size)
    micro_batch = choose_micro_batch(ctx, described)
    ctx.derive(
        {
            "num_conversations": len(mixture),
            "rows_per_epoch": rows_per_epoch,
            "tokens_per_iteration": rows_per_iteration * row_tokens,
            "num_iterations": num_iterations,
            "validation_rows": len(validation),
            **micro_batch.numbers(),
        }
    )

    def validate(iteration: int) -> dict[str, float]:
        peak = micro_batch.predicted_peak_bytes
        micro_tokens = forward_tokens(machine, model.sizes, training_peak_bytes=peak)
        return {"val_loss": mean_loss(text_model(ctx.team, model), validation, micro_tokens=micro_tokens)}

    def save(folder: Path) -> None:
        save_trained(ctx, folder, model, tokenizer, {**facts, "stage": ctx.stage, "format": "chat"})

    alone = config.packing == "alone"  # then most of a row is padding
    with RowBatches(pack(encoded), rows_per_iteration, trimmed=alone) as batches:
        fit(
            ctx,
            model,
            optimizer,
            batches,
            num_iterations=num_iterations,
            schedule=config.schedule,
            hooks=[
                Hook(run=validate, every=config.eval_every, also_every=(config.save_every,), at_start=True),
                *suite_hooks(ctx, config, model, tokenizer),
            ],
            micro_tokens=micro_batch.tokens,
            extends=ctx.inputs.get("extends"),
            keep_state=config.save_training_state,
            save=save,
            save_every=config.save_every,
            distillation=distillation,
        )
    ctx.metrics |= batches.counts()
    save(ctx.out)


def _batch_tokens(stage: str, config: FinetuneConfig, checkpoint: Path, facts: dict[str, Any]) -> int:
    """Return the tokens of an iteration, at least one row: as configured, or as many as in pretraining."""
    tokens = config.batch.tokens or facts.get("pretrain_batch_tokens")
    if tokens is None:
        raise DataError(f"{checkpoint} does not record the batch size of pretraining: set {stage}.batch.tokens")
    return whole_rows(int(tokens), config.batch.row_tokens)


def rates_of(optimizer: OptimizerConfig, *, table_lr_frac: float = 1.0, clip_gradients: bool = True) -> OptimizerConfig:
    """Return the optimizer of a stage: `table_lr_frac` scales all learning rates except those of the matrices."""
    groups = {
        name: group if name == "matrices" else replace(group, lr_frac=group.lr_frac * table_lr_frac)
        for name, group in optimizer.adamw_groups.items()
    }
    return replace(optimizer, adamw_groups=groups, grad_clip=optimizer.grad_clip if clip_gradients else None)


def begin_adapters(ctx: Context, config: AdapterConfig, model: GPT, dtype: mx.Dtype) -> AdamWRule | None:
    """Attach the adapters of a stage to its model and return their rule; None: all weights are trained.

    Raises:
        ConfigError: they do not fit the model.
    """
    sizes = adapter_sizes_of(f"{ctx.stage}.adapter", config, model.sizes)
    if sizes is None:
        return None
    attach_adapters(model, sizes, seed=ctx.seed("adapters"), dtype=dtype)
    rule = adapter_rule(config, model.sizes.width, ctx.config.optimizer)
    trained = sum(value.size for value in trained_parameters(model).values())
    ctx.derive({"num_trained_parameters": trained, "adapter_learning_rate": rule.lr})
    return rule


def save_trained(ctx: Context, folder: Path, model: GPT, tokenizer: Tokenizer, facts: dict[str, Any]) -> None:
    """Write the trained model into a folder, or its adapters, which name the base."""
    if (adapters := adapters_of(model)) is None:
        save_checkpoint(folder, model, tokenizer, facts)
        return
    base, trained = ctx.inputs["checkpoint"], trained_parameters(model)
    save_adapters(folder, trained, adapters, base=base, sizes=model.sizes, tokenizer=tokenizer, facts=facts)
