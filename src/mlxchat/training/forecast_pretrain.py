"""The forecast of a pretraining: its memory, and why it cannot extend another. Imports no MLX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlxchat.config.schema import Config
from mlxchat.model.sizes import GPTSizes, sizes_of
from mlxchat.ops.machine import DECODED_ROWS
from mlxchat.planning.horizon import derive_hyperparameters
from mlxchat.planning.memory import Training
from mlxchat.runner.plan import PlannedStep
from mlxchat.training.extension import find_extension_problems

# What weights, moments and the position in the data depend on.
_SAME = ("model", "architecture", "optimizer.kind", "optimizer.variant", "pretrain.packing")
_MAY_DIFFER = ("architecture.dropout",)


def memory(config: Config, stage: str, sizes: GPTSizes) -> Training:
    """Return what the memory of a pretraining depends on."""
    section, row_tokens = config.pretrain, config.pretrain.batch.row_tokens
    # A token has at least a byte; one more begins the text.
    prompts = [min(sizes.context_tokens, 1 + len(prompt.encode())) for prompt in section.prompts]
    return Training(
        sizes=sizes, optimizer=config.optimizer, row_tokens=row_tokens,
        rows=max(1, derive_hyperparameters(config, sizes).batch_tokens // row_tokens),
        further_weights=int(section.keep == "best"), sampled_rows=min(len(prompts), DECODED_ROWS),
        sampled_tokens=max(prompts, default=0) + section.sample_tokens,
        remedies=("a smaller model.depth", "a smaller pretrain.batch.row_tokens"),
    )  # fmt: skip


def problems(config: Config, step: PlannedStep, plan: list[PlannedStep], sizes: GPTSizes | None) -> Iterator[str]:
    """Yield why a step cannot extend the finished training that it names."""

    def count_wanted(derived: Mapping[str, Any]) -> int:
        model = sizes_of(config.model, config.architecture, derived["vocab_size"])
        return derive_hyperparameters(config, model).num_iterations

    yield from find_extension_problems(step, plan, same=_SAME, may_differ=_MAY_DIFFER, count_wanted=count_wanted)
