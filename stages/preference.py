"""Preference: make the chosen answer of a pair likelier than the rejected one, by DPO or ORPO.

nanochat has no counterpart. Losses: conf/preference/. Options: conf/settings/preference.yaml.
"""

from pathlib import Path
from typing import Any

from mlxchat.config.schema import TaskItem
from mlxchat.data.mixture import open_item
from mlxchat.data.tokens import open_mixture
from mlxchat.engine.generate import Engine
from mlxchat.errors import DataError
from mlxchat.model.checkpoint import load_checkpoint
from mlxchat.ops.device import prepare_machine
from mlxchat.optim.optimizer import Optimizer
from mlxchat.planning.horizon import count_later_iterations
from mlxchat.planning.memory import choose_micro_batch
from mlxchat.preference.batches import PairBatches, PairRows, reference_sums, validate
from mlxchat.preference.forecast import describe
from mlxchat.preference.loss import needs_reference
from mlxchat.preference.samples import sample_pairs, write_pairs
from mlxchat.rl.scores import PolicyScores
from mlxchat.runner.context import Context
from mlxchat.tasks import Conversation, Task
from mlxchat.tasks.pairs import Answers
from mlxchat.training.finetune import begin_adapters, rates_of, save_trained
from mlxchat.training.loop import Hook, fit

VERSION = 2
CONFIG = ["optimizer", "preference", "training"]
INPUTS = {"checkpoint": "checkpoint"}
PRODUCES = "checkpoint"
FORECAST = "mlxchat.preference.forecast"
FORMAT = "chat"
OUTPUTS = [
    "model.safetensors|adapters.safetensors",
    "config.json",
    "checkpoint.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
METRICS = {
    "val_pair_accuracy": "maximize while training",
    "val_loss": "minimize while training",
    "val_margin": "maximize while training",
    "loss": "minimize while training",
    "pair_accuracy": "maximize while training",
    "margin": "maximize while training",
    "val_chosen_log_prob": "neither",
    "val_rejected_log_prob": "neither",
    "val_pair_accuracy_stderr": "neither",
    "left_out_pairs": "minimize",
    "skipped_iterations": "minimize if training.on_nan=skip",
    "tokens_per_second": "maximize",
    "data_wait_frac": "minimize",
}
RESOURCES = ["gpu"]


def run(ctx: Context) -> None:
    config = ctx.config.preference
    dtype = prepare_machine(ctx.config.machine)
    model, tokenizer, facts = load_checkpoint(ctx.inputs["checkpoint"])
    rule = begin_adapters(ctx, config.adapter, model, dtype)
    rates = rates_of(ctx.config.optimizer, table_lr_frac=config.table_lr_frac)
    optimizer = Optimizer(model, rates, width=model.sizes.width, lr_frac=config.schedule.init_lr_frac, adapter=rule)
    micro_batch = choose_micro_batch(ctx, describe(config, ctx.config.optimizer, model.sizes))

    def open_pairs(name: str, item: TaskItem) -> PairRows:
        task = open_item(ctx, item)
        pairs: Task | list[Conversation] = task
        if not task.is_paired:
            options: dict[str, Any] = {"trained": True, "dtype": dtype, "max_rows": micro_batch.sampled_rows}
            engine = Engine(model, tokenizer, **options, team=ctx.team)
            pairs = sample_pairs(ctx, name, task, engine, config, seed=ctx.seed(f"samples of {name}"))
            write_pairs(ctx.out / f"{name}_pairs.jsonl", pairs)
        found = PairRows(
            open_mixture(ctx, name, Answers(pairs), tokenizer),
            answer_start=tokenizer.special_ids["<|assistant_start|>"],
            padding=tokenizer.assistant_end,
            row_tokens=config.row_tokens,
        )
        if not len(found):
            raise DataError(
                f"preference.{name}: all {found.num_left_out:,} pairs are longer than preference.row_tokens="
                f"{config.row_tokens}. Give longer rows, up to the model's context ({model.sizes.context_tokens})"
            )
        return found

    training, held_out = open_pairs("data", config.data), open_pairs("validation", config.validation)
    scores = PolicyScores(model, micro_tokens=micro_batch.tokens, dtype=dtype, team=ctx.team)
    num_iterations = count_later_iterations(config, len(training), config.pairs_per_iteration)
    ctx.metrics["left_out_pairs"] = training.num_left_out + held_out.num_left_out
    ctx.derive(
        {
            "num_pairs": len(training),
            "validation_pairs": len(held_out),
            "num_iterations": num_iterations,
            **micro_batch.numbers(),
        }
    )
    reference: dict[str, Any] = {"data": None, "validation": None}
    if needs_reference(config):
        for name, pairs in (("data", training), ("validation", held_out)):
            reference[name] = reference_sums(ctx, name, pairs, scores)

    def look(iteration: int) -> dict[str, float]:
        return validate(ctx, held_out, scores, reference["validation"], config)

    def save(folder: Path) -> None:
        save_trained(ctx, folder, model, tokenizer, {**facts, "stage": "preference", "format": "chat"})

    fit(
        ctx,
        model,
        optimizer,
        PairBatches(training, scores, reference["data"], config, seed=ctx.seed("order"), log=ctx.log),
        num_iterations=num_iterations,
        schedule=config.schedule,
        hooks=[Hook(run=look, every=config.eval_every, also_every=(config.save_every,), at_start=True)],
        micro_tokens=micro_batch.tokens,
        extends=ctx.inputs.get("extends"),
        keep_state=config.save_training_state,
        save=save,
        save_every=config.save_every,
    )
    save(ctx.out)
