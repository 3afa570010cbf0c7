"""The forecast of RL: its memory, and why it cannot extend another training. Imports no MLX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlxchat.config.schema import Config, OptimizerConfig, RLConfig
from mlxchat.model.adapter_problems import adapter_remedies, adapter_sizes_of
from mlxchat.model.sizes import GPTSizes
from mlxchat.ops.machine import DECODED_ROWS
from mlxchat.planning.horizon import count_later_iterations
from mlxchat.planning.memory import Training
from mlxchat.runner.plan import PlannedStep
from mlxchat.tasks import task_class
from mlxchat.training.extension import find_extension_problems

# What weights, moments or the position in the data depend on.
_SAME = (
    "seed", "optimizer.kind", "optimizer.variant", "rl.task", "rl.adapter", "rl.questions_per_iteration",
    "rl.minibatches_per_rollout", "rl.passes_per_rollout", "rl.resample_rounds",
)  # fmt: skip


def memory(config: Config, stage: str, sizes: GPTSizes) -> Training:
    """Return what the memory of RL depends on.

    Rows are as long as the tasks' bounds of prompts allow, or as the context; the stage measures the longest prompt.
    """
    limits = [task_class(item.task).prompt_tokens for item in (config.rl.task, config.rl.evaluation)]
    known = [limit for limit in limits if limit is not None]
    row_tokens = sizes.context_tokens
    if len(known) == len(limits):  # a token is a byte or more
        prompt_tokens = max(known) + len((config.rl.system_prompt or "").encode())
        row_tokens = prompt_tokens + longest_answer(config.rl)
    return describe(config.rl, config.optimizer, sizes, row_tokens)


def problems(config: Config, step: PlannedStep, plan: list[PlannedStep], sizes: GPTSizes | None) -> Iterator[str]:
    """Yield why a step cannot extend the finished training that it names."""

    def count_wanted(derived: Mapping[str, Any]) -> int:
        return count_later_iterations(config.rl, derived["num_questions"], config.rl.questions_per_iteration)

    yield from find_extension_problems(step, plan, same=_SAME, count_wanted=count_wanted)


def longest_answer(config: RLConfig) -> int:
    """Return the most tokens that an answer may have, in practice or evaluation."""
    return max(config.max_new_tokens, config.eval_max_new_tokens or 0)


def describe(config: RLConfig, optimizer: OptimizerConfig, sizes: GPTSizes, row_tokens: int) -> Training:
    """Return what the memory of RL depends on, with rows of at most `row_tokens` tokens."""
    adapters = adapter_sizes_of("rl.adapter", config.adapter, sizes)
    rows = config.questions_per_iteration * config.samples_per_question
    return Training(
        sizes=sizes, optimizer=optimizer, rows=rows, row_tokens=row_tokens, adapters=adapters,
        further_weights=(config.kl_coefficient > 0) + (config.keep == "best"),
        sampled_rows=min(rows, DECODED_ROWS), sampled_tokens=row_tokens,
        sampled_bits=config.rollout_bits,
        remedies=(*adapter_remedies("rl", adapters), "a smaller rl.max_new_tokens"),
    )  # fmt: skip
