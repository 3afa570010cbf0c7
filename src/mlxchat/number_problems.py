"""What is wrong with plain numbers of a configuration; the rest of what is checked is in `validation.py`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass

from mlxchat.config import Config
from mlxchat.errors import suggest
from mlxchat.runner.fingerprint import plain_of
from mlxchat.runner.plan import flatten_config


def find_range_problems(config: Config) -> Iterator[str]:
    """Yield a line for each plain number that is out of its range."""
    machine = config.machine
    factor = config.training.norm_warning_factor
    if factor is not None and not factor > 1:
        yield f"training.norm_warning_factor is {factor}, expected more than 1, or null for no warnings"
    if (cost := config.report.cost_per_hour) is not None and cost < 0:
        yield f"report.cost_per_hour is {cost:g}, expected at least 0, or null"
    for key in ("memory_limit_bytes", "cache_limit_bytes", "wired_limit_bytes"):
        if (limit := getattr(machine, key)) is not None and limit < 0:
            yield f"machine.{key} is {limit}, expected at least 0, or null for MLX's own"
    if machine.checkpoint_seconds < 0:
        yield f"machine.checkpoint_seconds is {machine.checkpoint_seconds}, expected at least 0 (every iteration)"
    if config.bench.warmup_steps < 0:
        yield f"bench.warmup_steps is {config.bench.warmup_steps}, expected at least 0"


def find_bound_problems(config: Config) -> Iterator[str]:
    """Yield a line for each value beyond the bounds that its field declares: at_least, at_most, one_of."""
    sections = [(item.name, getattr(config, item.name)) for item in fields(config)]
    while sections:
        key, section = sections.pop(0)
        for item in fields(section) if is_dataclass(section) else ():
            value, where, bounds = getattr(section, item.name), f"{key}.{item.name}", item.metadata
            sections.append((where, value))
            least, most, known = bounds.get("at_least"), bounds.get("at_most"), bounds.get("one_of")
            if value is None:
                continue
            if known is not None and value not in known:
                yield f'{where} is "{value}", expected {" or ".join(map(str, known))}.{suggest(str(value), known)}'
            if least is not None and not value >= least:
                yield f"{where} is {value}, expected at least {least}"
            if most is not None and not value <= most:
                yield f"{where} is {value}, expected at most {most}"


def find_unbounded(config: Config, told: Sequence[str]) -> Iterator[str]:
    """Yield a line for each number that is infinite or no number at all, except those that lines already tell of."""
    keys = {key for line in told for key in re.findall(r"\w+(?:\.\w+)+", line.partition(": ")[0])}
    for key, value in flatten_config(plain_of(config)).items():
        if isinstance(value, float) and not math.isfinite(value) and key not in keys:
            yield f"{key} is {value}, expected a number"


def find_zeros(config: Config) -> Iterator[str]:
    """Yield a line for each count that would silently do nothing at zero."""
    for key in (
        "model.context_tokens",
        "corpus.validation_documents",
        "corpus.shard_documents",
        "corpus.row_group_documents",
        "tokenizer.max_chars",
        "tokenizer.document_chars",
        "pretrain.packing_buffer_documents",
        "pretrain.eval_tokens",
        "pretrain.eval_every",
        "pretrain.keep_every",
        "pretrain.core_every",
        "pretrain.core_max_per_task",
        "pretrain.train_bpb_tokens",
        "pretrain.sample_every",
        "pretrain.sample_top_k",
        "midtrain.num_iterations",
        "midtrain.eval_every",
        *(
            f"{stage}.suite_{what}"
            for stage in ("midtrain", "sft")
            for what in ("every", "max_new_tokens", "batch_rows")
        ),
        "sft.num_iterations",
        "sft.eval_every",
        "rl.num_iterations",
        "rl.questions_per_iteration",
        "rl.max_new_tokens",
        "rl.eval_samples",
        "rl.eval_every",
        "rl.minibatches_per_rollout",
        "rl.passes_per_rollout",
        "rl.entropy_every",
        "training.max_skipped_in_a_row",
        "eval.batch_rows",
        "outside.context_tokens",
        "eval.seeds",
        "eval.top_k",
        "eval.max_new_tokens",
        "machine.device_batch_tokens",
        "machine.blas_threads",
        "machine.num_processes",
        "machine.log_every",
        "bench.vocab_size",
        "bench.batch_rows",
        "bench.chars",
        "bench.row_tokens",
        "bench.steps",
        "bench.core_examples",
    ):
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        if value is not None and value < 1:
            yield f"{key} is {value}, expected at least 1"
