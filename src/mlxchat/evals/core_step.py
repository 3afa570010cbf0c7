"""CORE within an evaluation step: fetches the bundle and records the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxchat.config.schema import CoreConfig
from mlxchat.evals.core import evaluate_core
from mlxchat.evals.core_questions import TextEncoder
from mlxchat.evals.language_model import LanguageModel
from mlxchat.hub.client import fetch_url, record
from mlxchat.runner.context import Context


def measure_core(
    ctx: Context, model: LanguageModel, tokenizer: TextEncoder, *, batch_tokens: int, examples: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Return a model's results on CORE's tasks as data of scores.json; None if eval.core is null.

    Args:
        ctx: of a stage that declares `eval`; gets metrics and externals.
        model: to evaluate.
        tokenizer: the model's.
        batch_tokens: tokens per forward pass.
        examples: gets a row for every example.

    Raises:
        DataError: the bundle cannot be read or fetched.
        Interrupted: the run was asked to stop; the next attempt continues.
    """
    config = ctx.config.eval.core
    if config is None:
        return None
    result = evaluate_core(
        model, tokenizer, open_bundle(ctx, config), max_per_task=config.max_per_task, tasks=config.tasks,
        long_prompts=config.long_prompts, batch_tokens=batch_tokens, work=ctx.work / "core", progress=ctx.progress,
        should_stop=ctx.should_stop, stop=ctx.stop,
    )  # fmt: skip
    examples += result.examples
    measured = {"core": result.core, "core_examples_per_second": result.examples_per_second}
    ctx.metrics |= {name: value for name, value in measured.items() if value is not None}
    return result.to_dict()


def open_bundle(ctx: Context, config: CoreConfig) -> Path:
    """Return the path of CORE's bundle; fetch it if it has a URL, and record that once in ctx.externals.

    Raises:
        DataError, PassingError: it cannot be fetched.
    """
    if "://" not in config.bundle:
        return Path(config.bundle)
    bundle = fetch_url(config.bundle, sha256=config.sha256)
    source = {"name": "eval_bundle", **record(bundle)}
    ctx.externals += [source] if source not in ctx.externals else []
    return bundle
