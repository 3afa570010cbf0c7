"""The forecast of preference training: its memory, and why it cannot run. Imports no MLX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlxchat.config.schema import Config, OptimizerConfig, PreferenceConfig
from mlxchat.model.adapter_problems import adapter_remedies, adapter_sizes_of
from mlxchat.model.sizes import GPTSizes
from mlxchat.ops.machine import DECODED_ROWS
from mlxchat.planning.horizon import count_later_iterations
from mlxchat.planning.memory import Training
from mlxchat.runner.plan import PlannedStep
from mlxchat.tasks import task_class
from mlxchat.training.extension import find_extension_problems

# What weights, moments or the position in the pairs depend on; where the model answers questions, its answers too.
_SAME = (
    "seed", "optimizer.kind", "optimizer.variant", "preference.data", "preference.adapter",
    "preference.pairs_per_iteration", "preference.row_tokens",
)  # fmt: skip
_SAMPLED = tuple(
    f"preference.{name}"
    for name in ("samples_per_question", "pairs_per_question", "max_new_tokens", "temperature", "top_k")
)


def memory(config: Config, stage: str, sizes: GPTSizes) -> Training:
    """Return what the memory of preference training depends on."""
    return describe(config.preference, config.optimizer, sizes)


def describe(config: PreferenceConfig, optimizer: OptimizerConfig, sizes: GPTSizes) -> Training:
    """Return what the memory of preference training depends on, whatever pairs are found."""
    adapters = adapter_sizes_of("preference.adapter", config.adapter, sizes)
    is_sampled = not all(task_class(item.task).is_paired for item in (config.data, config.validation))
    return Training(
        sizes=sizes, optimizer=optimizer, rows=2 * config.pairs_per_iteration, row_tokens=config.row_tokens,
        adapters=adapters, sampled_rows=DECODED_ROWS if is_sampled else 0,
        sampled_tokens=sizes.context_tokens + config.max_new_tokens,
        remedies=(*adapter_remedies("preference", adapters), "a smaller preference.row_tokens"),
    )  # fmt: skip


def problems(config: Config, step: PlannedStep, plan: list[PlannedStep], sizes: GPTSizes | None) -> Iterator[str]:
    """Yield why a step cannot train on rows of this length, or extend the finished training that it names."""
    rows = config.preference.row_tokens
    if sizes is not None and rows > sizes.context_tokens:
        yield (
            f"preference.row_tokens={rows} is longer than the context of the model that {step.name} starts from: "
            f"{sizes.context_tokens}. Give preference.row_tokens={sizes.context_tokens}"
        )

    def count_wanted(derived: Mapping[str, Any]) -> int:
        return count_later_iterations(config.preference, derived["num_pairs"], config.preference.pairs_per_iteration)

    same = _SAME if task_class(config.preference.data.task).is_paired else _SAME + _SAMPLED
    yield from find_extension_problems(step, plan, same=same, count_wanted=count_wanted)
