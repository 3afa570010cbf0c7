"""Preference: make the chosen answer of a pair likelier than the rejected one, by DPO or ORPO.

nanochat has no counterpart. Losses: conf/preference/. Settings: `PreferenceConfig` of config/schema.py.
"""

from functools import partial
from typing import Any

from mlxchat.planning.forecast import LOOP_METRICS, rl_memory, rl_problems
from mlxchat.runner.context import Context
from mlxchat.runner.stage import CHECKPOINT_FILES, WEIGHTS_OR_ADAPTERS, Metric, Stage

stage = Stage(
    version=4,
    inputs={"checkpoint": "checkpoint"},
    produces="checkpoint",
    outputs=[WEIGHTS_OR_ADAPTERS, *CHECKPOINT_FILES],
    reads=["optimizer", "preference", "training"],
    metrics=[
        Metric("val_pair_accuracy", "maximize", curve=True),
        Metric("val_loss", "minimize", curve=True),
        Metric("val_margin", "maximize", curve=True),
        Metric("loss", "minimize", curve=True),
        Metric("pair_accuracy", "maximize", curve=True),
        Metric("margin", "maximize", curve=True),
        Metric("val_chosen_log_prob"),
        Metric("val_rejected_log_prob"),
        Metric("val_pair_accuracy_stderr"),
        Metric("left_out_pairs", "minimize"),
        *LOOP_METRICS,
    ],
    uses_gpu=True,
    format="chat",
    memory=rl_memory,
    problems=rl_problems,
)


def run(ctx: Context) -> None:
    from mlxchat.config.schema import TaskItem
    from mlxchat.data.tokens import open_item, open_mixture
    from mlxchat.engine.generate import Engine
    from mlxchat.errors import DataError
    from mlxchat.model.checkpoint import load_checkpoint
    from mlxchat.ops.device import prepare_machine
    from mlxchat.planning.forecast import describe_pairs
    from mlxchat.planning.horizon import count_later_iterations
    from mlxchat.planning.memory import choose_micro_batch
    from mlxchat.rl.pairs import PairBatches, PairRows, sample_pairs, sum_pairs, validate, write_pairs
    from mlxchat.rl.rollouts import PolicyScores
    from mlxchat.tasks import Conversation, Task
    from mlxchat.tasks.jsonl import both_answers
    from mlxchat.training.finetune import make_optimizer, save_trained
    from mlxchat.training.loop import fit
    from mlxchat.training.monitor import Observation
    from mlxchat.training.step import make_step

    config = ctx.config.preference
    dtype = prepare_machine(ctx.config.machine)
    model, tokenizer, facts = load_checkpoint(ctx.inputs["checkpoint"])
    optimizer = make_optimizer(ctx, config, model, table_lr_frac=config.table_lr_frac)
    micro_batch = choose_micro_batch(ctx, describe_pairs(config, ctx.config.optimizer, model.sizes))

    def open_pairs(name: str, item: TaskItem) -> PairRows:
        task = open_item(ctx, item)
        pairs: Task | list[Conversation] = task
        if not task.is_paired:
            engine = Engine(model, tokenizer, dtype=dtype, max_rows=micro_batch.sampled_rows, team=ctx.team)
            pairs = sample_pairs(ctx, name, task, engine, config, seed=ctx.seed(f"samples of {name}"))
            write_pairs(ctx.out / f"{name}_pairs.jsonl", pairs)
        found = PairRows(
            open_mixture(ctx, name, both_answers(pairs), tokenizer),
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
    if config.loss == "dpo":
        for name, pairs in (("data", training), ("validation", held_out)):
            reference[name], _ = sum_pairs(ctx, pairs, scores)

    def look(iteration: int) -> dict[str, float]:
        return validate(ctx, held_out, scores, reference["validation"], config)

    save = partial(save_trained, ctx, model=model, tokenizer=tokenizer, facts=facts)
    fit(
        ctx,
        config,
        make_step(ctx, model, optimizer, micro_tokens=micro_batch.tokens),
        PairBatches(training, scores, reference["data"], config, seed=ctx.seed("order"), log=ctx.log),
        num_iterations=num_iterations,
        observations=[Observation(run=look, every=(config.eval_every, config.save_every), at_start=True)],
        save=save,
        save_every=config.save_every,
    )
    save(ctx.out)
