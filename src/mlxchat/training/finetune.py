"""Training that continues from a checkpoint: its optimizer for all stages, conversations for midtrain and sft."""

from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.config.schema import ConversationConfig, FinetuneConfig, TeacherConfig
from mlxchat.data.packing import RowBatches, RowStream, ShuffledConversations, count_rows, take_validation
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.tokens import Mixture, Tokens, open_item, open_mixture
from mlxchat.errors import DataError
from mlxchat.evals.bpb import mean_loss
from mlxchat.model.checkpoint import load_checkpoint, save_adapters, save_checkpoint
from mlxchat.model.gpt import GPT
from mlxchat.model.lora import adapters_of, attach_adapters
from mlxchat.model.parameters import trained_parameters
from mlxchat.model.sizes import resolve_adapter
from mlxchat.ops.device import prepare_machine
from mlxchat.optim.optimizer import Optimizer, adapter_rule
from mlxchat.planning.forecast import describe
from mlxchat.planning.horizon import count_later_iterations, whole_rows
from mlxchat.planning.memory import choose_micro_batch
from mlxchat.runner.context import Context
from mlxchat.training.loop import fit
from mlxchat.training.monitor import Observation, observe_suite
from mlxchat.training.state import load_moments
from mlxchat.training.step import Distillation, make_step


def finetune(ctx: Context, config: ConversationConfig) -> None:
    """Train the input checkpoint on the mixture's conversations."""
    checkpoint, machine = ctx.inputs["checkpoint"], ctx.config.machine
    dtype = prepare_machine(machine)
    model, tokenizer, facts = load_checkpoint(checkpoint)
    optimizer = make_optimizer(ctx, config, model, clip_gradients=config.clip_gradients)
    if config.warm_start:
        load_moments(checkpoint, optimizer)
    batch_tokens = config.batch.tokens or facts.get("pretrain_batch_tokens")
    if batch_tokens is None:
        raise DataError(f"{checkpoint} does not record the batch size of pretraining: set {ctx.stage}.batch.tokens")
    row_tokens = config.batch.row_tokens
    rows_per_iteration = whole_rows(int(batch_tokens), row_tokens) // row_tokens
    distillation, teacher_sizes = None, None
    if config.teacher.is_there:
        folder = ctx.inputs.get("teacher") or Path(config.teacher.path or "")
        distillation = load_teacher(config.teacher, folder, tokenizer, row_tokens=row_tokens, dtype=dtype)
        teacher_sizes = distillation.teacher.sizes
    order = config.mixture_order
    mixture = Mixture(config.mixture, seed=ctx.seed("mixture"), order=order, load=partial(open_item, ctx))
    encoded = open_mixture(ctx, "mixture", mixture, tokenizer)
    held_out = Mixture(config.validation, seed=ctx.data_seed("validation"), load=partial(open_item, ctx))

    def rows_of(conversations: Tokens, *, once: bool = False) -> RowStream:
        seed = ctx.seed("order") if once or order is None else None
        return RowStream(
            config.packing,
            ShuffledConversations(conversations, seed, mixture.name, once=once),
            row_tokens=row_tokens,
            buffer_size=100,  # nanochat's
            batch_rows=rows_per_iteration,
            padding=tokenizer.assistant_end if config.packing == "alone" else tokenizer.bos,
            train_on=config.train_on,
        )

    rows_per_epoch = count_rows(rows_of(encoded))
    num_iterations = count_later_iterations(config, rows_per_epoch, rows_per_iteration)
    held_out_rows = rows_of(open_mixture(ctx, "validation", held_out, tokenizer), once=True)
    validation = take_validation(held_out_rows, config.eval_tokens, f"{ctx.stage}.eval_tokens")
    # By length, since the padding that all rows of a batch end with is not computed.
    validation.sort(key=lambda row: int(np.flatnonzero(row[1] >= 0).max(initial=-1)))
    described = describe(ctx.stage, config, ctx.config.optimizer, model.sizes, rows_per_iteration, teacher_sizes)
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
        return {"val_loss": mean_loss(model, validation, micro_tokens=micro_batch.tokens, team=ctx.team)}

    with closing(rows_of(encoded)) as rows:
        # Alone in its row, a conversation leaves most of it to padding.
        batches = RowBatches(rows, rows_per_iteration, trimmed=config.packing == "alone")
        save = partial(save_trained, ctx, model=model, tokenizer=tokenizer, facts=facts)
        fit(
            ctx,
            config,
            make_step(ctx, model, optimizer, micro_tokens=micro_batch.tokens, distillation=distillation),
            batches,
            num_iterations=num_iterations,
            observations=[
                Observation(run=validate, every=(config.eval_every, config.save_every), at_start=True),
                *observe_suite(ctx, config, model, tokenizer),
            ],
            save=save,
            save_every=config.save_every,
        )
    ctx.metrics |= batches.counts()
    save(ctx.out)


def load_teacher(
    config: TeacherConfig, folder: Path, tokenizer: Tokenizer, *, row_tokens: int, dtype: mx.Dtype
) -> Distillation:
    """Return the teacher in a folder; DataError if its vocabulary is not the student's or its context is too short."""
    teacher, its_tokenizer, _ = load_checkpoint(folder)
    ours, theirs = (each.special_ids | dict(each.ranks) for each in (tokenizer, its_tokenizer))
    if ours != theirs:
        raise DataError(
            f"the teacher {folder} has another vocabulary: {len(theirs):,} tokens there, {len(ours):,} here, of which "
            f"{len(ours.items() & theirs.items()):,} are the same. Its distributions are over other tokens. Train on "
            "its answers instead: mlxchat distill"
        )
    if (context := teacher.sizes.context_tokens) < row_tokens:
        raise DataError(
            f"the teacher {folder} takes {context:,} tokens at a time, rows have {row_tokens:,}: lower batch.row_tokens"
        )
    return Distillation(teacher, config, dtype)


def make_optimizer(
    ctx: Context, config: FinetuneConfig, model: GPT, *, table_lr_frac: float = 1.0, clip_gradients: bool = True
) -> Optimizer:
    """Return the optimizer of a stage that trains a checkpoint, after attaching the stage's adapters, if any.

    `table_lr_frac` scales all learning rates except those of the matrices.
    """
    given, sizes = ctx.config.optimizer, resolve_adapter(f"{ctx.stage}.adapter", config.adapter, model.sizes)
    groups = {
        name: group if name == "matrices" else replace(group, lr=group.lr * table_lr_frac)
        for name, group in given.adamw_groups.items()
    }
    rates = replace(given, adamw_groups=groups, grad_clip=given.grad_clip if clip_gradients else None)
    rule = None
    if sizes is not None:
        attach_adapters(model, sizes, seed=ctx.seed("adapters"), dtype=prepare_machine(ctx.config.machine))
        rule = adapter_rule(config.adapter, model.sizes.width)
        trained = sum(value.size for value in trained_parameters(model).values())
        ctx.derive({"num_trained_parameters": trained, "adapter_learning_rate": rule.lr})
    return Optimizer(model, rates, width=model.sizes.width, lr_frac=config.schedule.init_lr_frac, adapter=rule)


def save_trained(ctx: Context, folder: Path, *, model: GPT, tokenizer: Tokenizer, facts: dict[str, Any]) -> None:
    """Write the trained model into a folder, or its adapters, which name the base; `facts` are those of the base."""
    facts = {**facts, "stage": ctx.stage, "format": "chat"}
    if (adapters := adapters_of(model)) is None:
        save_checkpoint(folder, model, tokenizer, facts)
        return
    base, trained = ctx.inputs["checkpoint"], trained_parameters(model)
    save_adapters(folder, trained, adapters, base=base, sizes=model.sizes, tokenizer=tokenizer, facts=facts)
