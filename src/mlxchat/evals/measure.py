"""What the stages eval and outside measure of a model, whoever trained it."""

import json
import math
from collections.abc import Mapping
from typing import Any

from mlxchat.config.parts import load_part
from mlxchat.data.mixture import open_item
from mlxchat.data.packing import RowStream, take_validation
from mlxchat.data.sources import Corpus
from mlxchat.data.tokens import open_documents
from mlxchat.engine.generate import Engine
from mlxchat.errors import StepFailed
from mlxchat.evals.bpb import measure_text, ngram_bits_per_byte, text_loss, texts_of_rows, uniform_bits_per_byte
from mlxchat.evals.chat import Answering, evaluate_task
from mlxchat.evals.core import measure_core, measure_plain_choice
from mlxchat.evals.examples import EXAMPLES_FILE, write_examples
from mlxchat.evals.scores import Score, chatcore, mean_centered
from mlxchat.runner.context import Context


def measure(ctx: Context, engine: Engine, *, as_base: bool, as_chat: bool) -> dict[str, Any]:
    """Return what `eval` and `suite` demand of a model as data of scores.json, write its examples, record metrics.

    `as_base` measures CORE and multiple choice as plain text, `as_chat` the suite; `corpus` is an optional input.
    """
    examples: list[dict[str, Any]] = []
    scores: dict[str, Any] = {
        "bpb": _measure_corpus(ctx, engine) if "corpus" in ctx.inputs else None,
        "core": measure_core(ctx, engine, examples) if as_base else None,
        **_measure_suite(ctx, engine, examples, as_chat=as_chat),
        "pass_at_k": None,
    }
    if as_base and ctx.config.eval.base_tasks:
        scores["tasks"] |= measure_plain_choice(ctx, engine, examples)
    if ctx.config.eval.text is not None:
        scores["text"] = measure_text(ctx, engine)
    write_examples(ctx.out / EXAMPLES_FILE, examples)
    return scores


def write_scores(ctx: Context, scores: dict[str, Any]) -> None:
    """Write scores.json."""
    (ctx.out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


def measure_own(engine: Engine, functions: Mapping[str, str]) -> dict[str, float]:
    """Return name → the finite number that the user's function `module:name` of `eval.own` returns for a model."""
    found = {}
    for name, function in sorted(functions.items()):
        value = load_part(function)(engine)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise StepFailed(f"eval.own.{name}: {function} returned {value!r}, expected a finite number")
        found[name] = float(value)
    return found


def _measure_corpus(ctx: Context, engine: Engine) -> dict[str, float]:
    """Return how well the validation text, in rows of the model's own tokens, is predicted, also by baselines."""
    documents = open_documents(ctx, "validation", engine.tokenizer, once=True)
    rows = take_validation(
        RowStream("best_fit", documents, row_tokens=engine.context_tokens, buffer_size=1000),
        row_tokens=engine.context_tokens,
        tokens=ctx.config.eval.bpb_tokens, setting="eval.bpb_tokens",
    )  # fmt: skip
    loss = text_loss(
        engine.model, rows, engine.tokenizer.token_bytes, micro_tokens=engine.batch_tokens, team=engine.team
    )
    found = {"val": loss.bits_per_byte, "perplexity": loss.perplexity, "tokens": loss.num_tokens}
    ctx.metrics |= {"val_bpb": loss.bits_per_byte, "perplexity": loss.perplexity}
    if engine.is_ours:  # others have other rows, so other baselines
        training = Corpus.open(ctx.inputs["corpus"]).documents("train")
        found["ngram_order2"] = ngram_bits_per_byte(training, texts_of_rows(rows, engine.tokenizer))
        found["untrained"] = uniform_bits_per_byte(rows, engine.tokenizer.token_bytes)
        ctx.metrics |= {"ngram_bpb": found["ngram_order2"], "untrained_bpb": found["untrained"]}
    return found


def _measure_suite(ctx: Context, engine: Engine, examples: list[dict[str, Any]], *, as_chat: bool) -> dict[str, Any]:
    """Return the scores of the suite and their means, also as metrics; third-party models answer greedily, once."""
    config, results, suite = ctx.config.eval, dict[str, Score](), sorted(ctx.config.suite.items())
    seeds = config.seeds if engine.is_ours else 1
    temperature = float(seeds > 1) if config.temperature is None or not engine.is_ours else config.temperature
    # All at first, so that a task that cannot be judged on this machine ends the step before any answer.
    tasks = {name: open_item(ctx, item) for name, item in suite} if as_chat else {}
    for name, task in tasks.items():
        answering = Answering(
            batch_rows=config.batch_rows, max_new_tokens=config.max_new_tokens, seeds=seeds, temperature=temperature,
            top_k=config.top_k if engine.is_ours else None, seed=ctx.seed(f"answers/{name}"),
        )  # fmt: skip
        results[name], rows = evaluate_task(ctx, engine, task, answering, name=name, work=ctx.work / "tasks" / name)
        examples += [{"task": name, **row} for row in rows]
        ctx.metrics[name] = results[name].accuracy
    mean = mean_centered(list(results.values()))
    whole = chatcore(results, {name: item.task for name, item in suite if item.split == "test"})
    measured = {"mean_centered": mean, "chatcore": None if whole is None else whole["value"]}
    ctx.metrics |= {name: value for name, value in measured.items() if value is not None}
    return {
        "tasks": {name: score.to_dict() for name, score in results.items()}, "mean_centered": mean, "chatcore": whole,
    }  # fmt: skip
