"""Outside: measure a model of another make as ours are measured, so that both stand in one table.

Any folder that mlx-lm opens. Options: conf/settings/outside.yaml, conf/settings/eval.yaml, conf/core/, conf/suite/.
"""

import json
from pathlib import Path
from typing import Any

from mlxchat.data.mixture import open_item
from mlxchat.data.packing import DocumentRows, take_validation
from mlxchat.data.tokens import open_documents
from mlxchat.evals.bpb import text_loss
from mlxchat.evals.chat_scores import record_suite
from mlxchat.evals.core_step import measure_core
from mlxchat.evals.examples import write_examples
from mlxchat.evals.outside import OutsideModel, OutsideTokenizer, load_outside
from mlxchat.evals.outside_chat import evaluate_outside_task
from mlxchat.ops.device import prepare_machine
from mlxchat.runner.context import Context

VERSION = 2
CONFIG = ["outside", "suite", "eval"]
READS_IF = {"eval.bpb_tokens": "corpus", "eval.seeds": "never", "eval.temperature": "never", "eval.top_k": "never"}
INPUTS: dict[str, str] = {}
OPTIONAL_INPUTS = {"corpus": "corpus"}
PRODUCES = "scores"
OUTPUTS = ["scores.json", "examples.parquet"]
METRICS = {
    "val_bpb": "minimize if corpus",
    "perplexity": "minimize if corpus",
    "core": "maximize if eval.core and not eval.core.tasks",
    "{suite}": "maximize",
    "mean_centered": "maximize if suite",
    "chatcore": "maximize if chatcore",
    "core_examples_per_second": "maximize if eval.core",
}
RESOURCES = ["gpu"]
LABEL = "outside.name"

# Tokens at a time: nothing is known of the model's size, and every option's cache is a copy.
_BATCH_TOKENS = 4096


def run(ctx: Context) -> None:
    config = ctx.config.outside
    assert config.path is not None  # validated while planning
    prepare_machine(ctx.config.machine)
    model, tokenizer = load_outside(Path(config.path), context_tokens=config.context_tokens)
    examples: list[dict[str, Any]] = []
    scores: dict[str, Any] = {
        "checkpoint": config.name,
        "outside": {"name": config.name, "model_type": model.model_type, "context_tokens": model.context_tokens},
        "bpb": _measure_text(ctx, model, tokenizer) if "corpus" in ctx.inputs else None,
        "core": measure_core(ctx, model, tokenizer, batch_tokens=_BATCH_TOKENS, examples=examples),
    }
    chats = tokenizer.has_chat_template if config.chat is None else config.chat
    scores |= _measure_tasks(ctx, model, tokenizer, examples if chats else None) | {"pass_at_k": None}
    write_examples(ctx.out / "examples.parquet", examples)
    (ctx.out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


def _measure_text(ctx: Context, model: OutsideModel, tokenizer: OutsideTokenizer) -> dict[str, float]:
    """Return how well the validation text is predicted, cut into rows of the model's own tokens."""
    documents = open_documents(ctx, "validation", tokenizer, once=True)
    rows = take_validation(
        DocumentRows(documents, model.context_tokens, buffer_documents=1000), row_tokens=model.context_tokens,
        tokens=ctx.config.eval.bpb_tokens, setting="eval.bpb_tokens",
    )  # fmt: skip
    loss = text_loss(model, rows, tokenizer.token_bytes, micro_tokens=_BATCH_TOKENS)
    ctx.metrics |= {"val_bpb": loss.bits_per_byte, "perplexity": loss.perplexity}
    return {"val": loss.bits_per_byte, "perplexity": loss.perplexity, "tokens": loss.num_tokens}


def _measure_tasks(
    ctx: Context, model: OutsideModel, tokenizer: OutsideTokenizer, examples: list[dict[str, Any]] | None
) -> dict[str, Any]:
    """Return the scores of the suite's tasks, and add their examples; None: the model cannot chat."""
    config, results = ctx.config.eval, {}

    def check() -> None:
        if ctx.should_stop():
            raise ctx.stop("its questions")

    for name, item in sorted(ctx.config.suite.items()) if examples is not None else ():
        task = open_item(ctx, item)
        with ctx.progress(len(task), f"questions of {name}") as progress:
            results[name], found = evaluate_outside_task(
                model, tokenizer, task, name=name, batch_rows=config.batch_rows,
                max_new_tokens=config.max_new_tokens, work=ctx.work / "tasks", on_progress=progress.update, check=check,
            )  # fmt: skip
        assert examples is not None
        examples += found
        ctx.metrics[name] = results[name].accuracy
    return record_suite(ctx, results)
