"""RL: sample completions, reward them, make the better ones likelier.

Counterpart of nanochat's scripts/chat_rl.py: on-policy REINFORCE with the group's mean reward as baseline and
token-level normalisation; no KL penalty, ratio or clipping. Other losses: conf/rl/. Options: conf/settings/rl.yaml.
"""

from pathlib import Path
from typing import Any

from mlxchat.data.mixture import open_item
from mlxchat.engine.generate import Engine
from mlxchat.evals.quantised import check_quantised
from mlxchat.model.checkpoint import load_checkpoint
from mlxchat.model.gpt import trained_parameters
from mlxchat.ops.device import prepare_machine
from mlxchat.optim.optimizer import Optimizer
from mlxchat.planning.horizon import count_later_iterations
from mlxchat.planning.memory import choose_micro_batch
from mlxchat.rl.forecast import describe, longest_answer
from mlxchat.rl.rollouts import Rollouts, conversation_rows, longest_prompt, pass_at_k, updates_per_rollout
from mlxchat.rl.scores import PolicyScores
from mlxchat.runner.context import Context
from mlxchat.store.fingerprint import plain_of
from mlxchat.training.best import Best
from mlxchat.training.finetune import begin_adapters, rates_of, save_trained
from mlxchat.training.loop import Hook, fit

VERSION = 7
CONFIG = ["optimizer", "rl", "training"]
INPUTS = {"checkpoint": "checkpoint"}
PRODUCES = "checkpoint"
FORECAST = "mlxchat.rl.forecast"
FORMAT = "chat"
OUTPUTS = [
    "model.safetensors|adapters.safetensors",
    "config.json",
    "checkpoint.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
METRICS = {
    "pass_at_{rl.eval_samples}": "maximize",
    "held_out_reward": "maximize",
    "reward": "maximize while training",
    "best_iteration": "neither if rl.keep=best",
    "last_pass_at_{rl.eval_samples}": "maximize if rl.keep=best",
    "last_held_out_reward": "maximize if rl.keep=best",
    "pass_at_{rl.eval_samples}_stderr": "neither",
    "held_out_reward_stderr": "neither",
    "loss": "neither",
    "rollout_loss_change": "minimize if rl.rollout_bits",
    "skipped_iterations": "minimize if training.on_nan=skip",
    "tokens_per_second": "maximize",
    "data_wait_frac": "minimize",
}
RESOURCES = ["gpu"]


def run(ctx: Context) -> None:
    config, machine = ctx.config.rl, ctx.config.machine
    dtype = prepare_machine(machine)
    model, tokenizer, facts = load_checkpoint(ctx.inputs["checkpoint"])
    practice, held_out = open_item(ctx, config.task), open_item(ctx, config.evaluation)
    rates = rates_of(ctx.config.optimizer, table_lr_frac=config.table_lr_frac, clip_gradients=config.clip_gradients)
    if config.rollout_bits is not None:
        rows = conversation_rows(tokenizer, held_out)
        ctx.metrics["rollout_loss_change"] = check_quantised(model, config.rollout_bits, rows)
    rule = begin_adapters(ctx, config.adapter, model, dtype)
    optimizer = Optimizer(model, rates, width=model.sizes.width, lr_frac=config.schedule.init_lr_frac, adapter=rule)
    num_iterations = count_later_iterations(config, len(practice), config.questions_per_iteration)
    samples_per_iteration = config.questions_per_iteration * config.samples_per_question
    updates = updates_per_rollout(config)
    # A copy of the trained weights. Of adapters it is small: adapters that are not trained yet leave the base as it is.
    reference = trained_parameters(model) if config.kl_coefficient > 0 else None
    row_tokens = longest_prompt(tokenizer, config, practice, held_out) + longest_answer(config)
    micro_batch = choose_micro_batch(ctx, describe(config, ctx.config.optimizer, model.sizes, row_tokens))
    ctx.derive(
        {
            "num_iterations": num_iterations,
            **({"num_updates": num_iterations * updates} if updates > 1 else {}),
            "samples_per_iteration": samples_per_iteration,
            "num_questions": len(practice),
            **micro_batch.numbers(),
        }
    )

    options: dict[str, Any] = {"trained": True, "dtype": dtype, "max_rows": micro_batch.sampled_rows}
    engine = Engine(model, tokenizer, **options, team=ctx.team)

    def evaluate(iteration: int) -> dict[str, float]:
        return pass_at_k(engine, held_out, config, seed=ctx.seed("evaluation"))

    sampler = engine
    if config.rollout_bits is not None:
        sampler = Engine(model, tokenizer, bits=config.rollout_bits, **options, team=ctx.team)
    rollouts = Rollouts(
        sampler,
        practice,
        config,
        seed=ctx.seed("rollouts"),
        log=ctx.log,
        scores=PolicyScores(model, micro_tokens=micro_batch.tokens, dtype=dtype, team=ctx.team),
        keep=ctx.records("rollouts").append,
        reference=reference,
    )

    best, candidates = None, None
    if config.keep == "best":
        held_out_settings = [config.eval_samples, config.eval_max_new_tokens, config.temperature, config.top_k]
        candidates = updates * (config.keep_every or -(-num_iterations // 20))
        best = Best(
            every=candidates,
            basis=[plain_of(config.evaluation), config.system_prompt, *held_out_settings],
            metric="held_out_reward",
            choose=max,
        )

    def save(folder: Path) -> None:
        save_trained(ctx, folder, model, tokenizer, {**facts, "stage": "rl", "format": "chat"})

    eval_every, save_every = (every and every * updates for every in (config.eval_every, config.save_every))
    fit(
        ctx,
        model,
        optimizer,
        rollouts,
        num_iterations=num_iterations * updates,
        schedule=config.schedule,
        hooks=[Hook(run=evaluate, every=eval_every, also_every=(save_every, candidates), at_start=True)],
        micro_tokens=micro_batch.tokens,
        extends=ctx.inputs.get("extends"),
        keep_state=config.save_training_state,
        save=save,
        save_every=save_every,
        best=best,
    )
    ctx.metrics["reward"] = rollouts.mean_reward
    if best is not None:
        facts["best_iteration"] = best.iteration
    save(ctx.out)
