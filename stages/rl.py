"""RL: sample completions, reward them, make the better ones likelier.

Counterpart of nanochat's scripts/chat_rl.py: on-policy REINFORCE with the group's mean reward as baseline and
token-level normalisation; no KL penalty, ratio or clipping. Other losses: conf/rl/.
Settings: `RLConfig` of config/schema.py.
"""

from functools import partial
from typing import Any

from mlxchat.config.schema import Config
from mlxchat.planning.forecast import LOOP_METRICS, rl_memory, rl_problems
from mlxchat.runner.context import Context
from mlxchat.runner.stage import CHECKPOINT_FILES, WEIGHTS_OR_ADAPTERS, Metric, Stage


def numbers_of_samples(config: Config) -> range:
    return range(1, config.rl.eval_samples + 1)


stage = Stage(
    version=9,
    inputs={"checkpoint": "checkpoint"},
    produces="checkpoint",
    outputs=[WEIGHTS_OR_ADAPTERS, *CHECKPOINT_FILES],
    reads=["optimizer", "rl", "training"],
    metrics=[
        Metric("pass_at_*", "maximize", names=numbers_of_samples),
        Metric("held_out_reward", "maximize"),
        Metric("reward", "maximize", curve=True),
        Metric("pass_at_*_stderr", names=numbers_of_samples),
        Metric("held_out_reward_stderr"),
        Metric("loss"),
        *LOOP_METRICS,
    ],
    uses_gpu=True,
    format="chat",
    memory=rl_memory,
    problems=rl_problems,
)


def run(ctx: Context) -> None:
    from mlxchat.data.tokens import open_item
    from mlxchat.engine.generate import Engine
    from mlxchat.model.checkpoint import load_checkpoint
    from mlxchat.model.parameters import trained_parameters
    from mlxchat.ops.device import prepare_machine
    from mlxchat.planning.forecast import describe_rl
    from mlxchat.planning.horizon import count_later_iterations
    from mlxchat.planning.memory import choose_micro_batch
    from mlxchat.rl.rollouts import PolicyScores, Rollouts, longest_prompt, pass_at_k, updates_per_rollout
    from mlxchat.training.finetune import make_optimizer, save_trained
    from mlxchat.training.loop import fit
    from mlxchat.training.monitor import Observation
    from mlxchat.training.step import make_step

    config, machine = ctx.config.rl, ctx.config.machine
    dtype = prepare_machine(machine)
    model, tokenizer, facts = load_checkpoint(ctx.inputs["checkpoint"])
    practice, held_out = open_item(ctx, config.task), open_item(ctx, config.evaluation)
    optimizer = make_optimizer(
        ctx, config, model, table_lr_frac=config.table_lr_frac, clip_gradients=config.clip_gradients
    )
    num_iterations = count_later_iterations(config, len(practice), config.questions_per_iteration)
    samples_per_iteration = config.questions_per_iteration * config.samples_per_question
    updates = updates_per_rollout(config)
    # A copy of the trained weights. Of adapters it is small: adapters that are not trained yet leave the base as it is.
    reference = trained_parameters(model) if config.kl_coefficient > 0 else None
    row_tokens = longest_prompt(tokenizer, practice, held_out) + config.max_new_tokens
    micro_batch = choose_micro_batch(ctx, describe_rl(config, ctx.config.optimizer, model.sizes, row_tokens))
    ctx.derive(
        {
            "num_iterations": num_iterations,
            **({"num_updates": num_iterations * updates} if updates > 1 else {}),
            "samples_per_iteration": samples_per_iteration,
            "num_questions": len(practice),
            **micro_batch.numbers(),
        }
    )

    options: dict[str, Any] = {"dtype": dtype, "max_rows": micro_batch.sampled_rows}
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

    eval_every, save_every = (every and every * updates for every in (config.eval_every, config.save_every))
    save = partial(save_trained, ctx, model=model, tokenizer=tokenizer, facts=facts)
    fit(
        ctx,
        config,
        make_step(ctx, model, optimizer, micro_tokens=micro_batch.tokens),
        rollouts,
        num_iterations=num_iterations * updates,
        observations=[Observation(run=evaluate, every=(eval_every, save_every), at_start=True)],
        save=save,
        save_every=save_every,
    )
    ctx.metrics["reward"] = rollouts.mean_reward
    save(ctx.out)
