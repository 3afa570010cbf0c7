"""RL: sample answers, reward the right ones, make them likelier.

Counterpart of nanochat's scripts/chat_rl.py: on-policy REINFORCE with the question's mean reward as baseline and
token-level normalisation; no KL penalty, no ratio, no clipping. Options: conf/settings/rl.yaml.
"""

from dataclasses import replace

from mlxchat.data.mixture import open_item
from mlxchat.engine.generate import Engine
from mlxchat.model.checkpoint import load_checkpoint, save_checkpoint
from mlxchat.optim.groups import Optimizer
from mlxchat.runner.context import Context
from mlxchat.training.loop import Hook, fit
from mlxchat.training.micro_batch import choose_micro_batch
from mlxchat.training.rollouts import Rollouts, pass_at_k

VERSION = 2
CONFIG = ["optimizer", "rl", "training"]
INPUTS = {"checkpoint": "checkpoint"}
PRODUCES = "checkpoint"
OUTPUTS = ["model.safetensors", "config.json", "checkpoint.json", "tokenizer.json", "tokenizer_config.json"]
RESOURCES = ["gpu"]


def run(ctx: Context) -> None:
    config = ctx.config.rl
    model, tokenizer, facts = load_checkpoint(ctx.inputs["checkpoint"])
    engine = Engine(model, tokenizer)
    practice, held_out = open_item(ctx, config.task), open_item(ctx, config.evaluation)
    rates = ctx.config.optimizer if config.clip_gradients else replace(ctx.config.optimizer, grad_clip=None)
    optimizer = Optimizer(model, rates, width=model.sizes.width, lr_frac=config.schedule.init_lr_frac)
    num_iterations = config.num_iterations or max(1, len(practice) // config.questions_per_iteration)
    samples_per_iteration = config.questions_per_iteration * config.samples_per_question
    # Samples are seldom as long as the context, but may be.
    longest = model.sizes.context_tokens
    micro_batch = choose_micro_batch(ctx, model.sizes, rows=samples_per_iteration, row_tokens=longest)
    ctx.derive(
        {
            "num_iterations": num_iterations,
            "samples_per_iteration": samples_per_iteration,
            "num_questions": len(practice),
            **micro_batch.numbers(),
        }
    )

    def evaluate(iteration: int) -> dict[str, float]:
        return pass_at_k(engine, held_out, config, seed=ctx.seed("evaluation"))

    rollouts = Rollouts(engine, practice, config, seed=ctx.seed("rollouts"), log=ctx.log)
    fit(
        ctx,
        model,
        optimizer,
        rollouts,
        num_iterations=num_iterations,
        schedule=config.schedule,
        hooks=[Hook(run=evaluate, every=config.eval_every, at_start=True)],
        micro_tokens=micro_batch.tokens,
    )
    ctx.metrics["reward"] = rollouts.mean_reward
    save_checkpoint(ctx.out, model, tokenizer, {**facts, "stage": "rl", "format": "chat"})
