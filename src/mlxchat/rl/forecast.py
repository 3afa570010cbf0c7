"""The forecasts of RL and preference training: their memory, and why they cannot run."""

from __future__ import annotations

from collections.abc import Iterator

from mlxchat.config.schema import Config, OptimizerConfig, PreferenceConfig, RLConfig
from mlxchat.model.sizes import GPTSizes, adapter_remedies, resolve_adapter
from mlxchat.ops.machine import DECODED_ROWS
from mlxchat.planning.memory import Decoding, Training
from mlxchat.runner.plan import PlannedStep
from mlxchat.tasks import task_class
from mlxchat.training.forecast import find_extension_problems

# What weights, moments or the position in the data depend on; where the model answers questions, its answers too.
_ROLLOUT = ("questions_per_iteration", "minibatches_per_rollout", "passes_per_rollout", "resample_rounds")
_SAME_RL = ("task", "adapter", *_ROLLOUT)
_SAME_PAIRS = ("data", "adapter", "pairs_per_iteration", "row_tokens")
_SAME_SAMPLES = ("samples_per_question", "pairs_per_question", "max_new_tokens", "temperature", "top_k")


def memory(config: Config, stage: str, sizes: GPTSizes) -> Training:
    """Return what the memory of a stage depends on; RL measures its longest prompt, of which tasks may have a bound."""
    if stage == "preference":
        return describe_pairs(config.preference, config.optimizer, sizes)
    row_tokens = sizes.context_tokens
    limits = [task_class(item.task).prompt_tokens for item in (config.rl.task, config.rl.evaluation)]
    known = [limit for limit in limits if limit is not None]
    if len(known) == len(limits):  # a token is a byte or more
        row_tokens = max(known) + config.rl.max_new_tokens
    return describe(config.rl, config.optimizer, sizes, row_tokens)


def problems(config: Config, step: PlannedStep, plan: list[PlannedStep], sizes: GPTSizes | None) -> Iterator[str]:
    """Yield why a step cannot train on rows of this length, or extend the finished training that it names."""
    same: tuple[str, ...] = _SAME_RL
    if step.stage.name != "rl":
        is_sampled = not task_class(config.preference.data.task).is_paired
        same = _SAME_PAIRS + (_SAME_SAMPLES if is_sampled else ())
        rows = config.preference.row_tokens
        if sizes is not None and rows > sizes.context_tokens:
            yield (
                f"preference.row_tokens={rows} is longer than the context of the model that {step.name} starts from: "
                f"{sizes.context_tokens}. Give preference.row_tokens={sizes.context_tokens}"
            )
    settings = (f"{step.stage.name}.{name}" for name in same)
    yield from find_extension_problems(step, plan, ("seed", "optimizer.kind", "optimizer.variant", *settings))


def describe(config: RLConfig, optimizer: OptimizerConfig, sizes: GPTSizes, row_tokens: int) -> Training:
    """Return what the memory of RL depends on, with rows of at most `row_tokens` tokens."""
    adapters = resolve_adapter("rl.adapter", config.adapter, sizes)
    rows = config.questions_per_iteration * config.samples_per_question
    return Training(
        sizes=sizes,
        optimizer=optimizer,
        rows=rows,
        row_tokens=row_tokens,
        adapters=adapters,
        further_weights=int(config.kl_coefficient > 0),
        sampling=Decoding(sizes=sizes, row_tokens=row_tokens, bits=config.rollout_bits),
        sampled_rows=min(rows, DECODED_ROWS),
        remedies=(*adapter_remedies("rl", adapters), "a smaller rl.max_new_tokens"),
    )


def describe_pairs(config: PreferenceConfig, optimizer: OptimizerConfig, sizes: GPTSizes) -> Training:
    """Return what the memory of preference training depends on, whatever pairs are found."""
    adapters = resolve_adapter("preference.adapter", config.adapter, sizes)
    sampled_tokens = sizes.context_tokens + config.max_new_tokens
    is_sampled = not all(task_class(item.task).is_paired for item in (config.data, config.validation))
    return Training(
        sizes=sizes,
        optimizer=optimizer,
        rows=2 * config.pairs_per_iteration,
        row_tokens=config.row_tokens,
        adapters=adapters,
        sampling=Decoding(sizes=sizes, row_tokens=sampled_tokens) if is_sampled else None,
        remedies=(*adapter_remedies("preference", adapters), "a smaller preference.row_tokens"),
    )
