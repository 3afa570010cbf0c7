"""Outside: measure a third-party model as ours are measured, so that both stand in one table.

Any folder that mlx-lm opens. Options: conf/settings/outside.yaml, conf/settings/eval.yaml, conf/core/, conf/suite/.
"""

import json
from pathlib import Path
from typing import Any

from mlxchat.data.mixture import open_item
from mlxchat.data.packing import DocumentRows, take_validation
from mlxchat.data.tokens import open_documents
from mlxchat.engine.third_party import ThirdPartyEngine
from mlxchat.evals.bpb import text_loss
from mlxchat.evals.chat import Answering, evaluate_task
from mlxchat.evals.core import measure_core
from mlxchat.evals.examples import write_examples
from mlxchat.evals.plain_choice import measure_plain_choice
from mlxchat.evals.scores import record_suite
from mlxchat.evals.text import measure_text
from mlxchat.evals.third_party import MOST_CONTEXT_TOKENS, ThirdPartyModel
from mlxchat.ops.device import prepare_machine
from mlxchat.runner.context import Context

VERSION = 4
CONFIG = ["outside", "suite", "eval"]
READS_IF = {"eval.bpb_tokens": "corpus", "eval.seeds": "never", "eval.temperature": "never", "eval.top_k": "never"}
INPUTS: dict[str, str] = {}
OPTIONAL_INPUTS = {"corpus": "corpus"}
PRODUCES = "scores"
OUTPUTS = ["scores.json", "examples.parquet"]
METRICS = {
    "val_bpb": "minimize if corpus",
    "perplexity": "minimize if corpus",
    "text_bpb": "minimize if eval.text",
    "text_perplexity": "minimize if eval.text",
    "core": "maximize if eval.core and not eval.core.tasks",
    "{suite}": "maximize",
    "{eval.base_tasks}": "maximize",
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
    engine = ThirdPartyEngine.load(
        Path(config.path), context_tokens=config.context_tokens, most_context_tokens=MOST_CONTEXT_TOKENS
    )
    model = ThirdPartyModel(engine.model, engine.context_tokens)
    examples: list[dict[str, Any]] = []
    scores: dict[str, Any] = {
        "checkpoint": config.name,
        "outside": {"name": config.name, "model_type": engine.model_type, "context_tokens": model.context_tokens},
        "bpb": _measure_text(ctx, model, engine) if "corpus" in ctx.inputs else None,
        "core": measure_core(ctx, model, engine.tokenizer, batch_tokens=_BATCH_TOKENS, examples=examples),
    }
    if ctx.config.eval.text is not None:
        scores["text"] = measure_text(
            ctx, model, engine.tokenizer, engine.tokenizer.token_bytes, context_tokens=model.context_tokens,
            micro_tokens=_BATCH_TOKENS,
        )  # fmt: skip
    chats = engine.tokenizer.has_chat_template if config.chat is None else config.chat
    scores |= _measure_tasks(ctx, engine, examples if chats else None) | {"pass_at_k": None}
    if ctx.config.eval.base_tasks:
        scores["tasks"] |= measure_plain_choice(
            ctx, model, engine.tokenizer, batch_tokens=_BATCH_TOKENS, examples=examples
        )  # fmt: skip
    write_examples(ctx.out / "examples.parquet", examples)
    (ctx.out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


def _measure_text(ctx: Context, model: ThirdPartyModel, engine: ThirdPartyEngine) -> dict[str, float]:
    """Return how well the validation text is predicted, cut into rows of the model's own tokens."""
    documents = open_documents(ctx, "validation", engine.tokenizer, once=True)
    rows = take_validation(
        DocumentRows(documents, model.context_tokens, buffer_documents=1000), row_tokens=model.context_tokens,
        tokens=ctx.config.eval.bpb_tokens, setting="eval.bpb_tokens",
    )  # fmt: skip
    loss = text_loss(model, rows, engine.tokenizer.token_bytes, micro_tokens=_BATCH_TOKENS)
    ctx.metrics |= {"val_bpb": loss.bits_per_byte, "perplexity": loss.perplexity}
    return {"val": loss.bits_per_byte, "perplexity": loss.perplexity, "tokens": loss.num_tokens}


def _measure_tasks(ctx: Context, engine: ThirdPartyEngine, examples: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Return the scores of the suite's tasks, and add their examples; None: the model cannot chat."""
    config, results = ctx.config.eval, {}
    answering = Answering(
        batch_rows=config.batch_rows, max_new_tokens=config.max_new_tokens, batch_tokens=_BATCH_TOKENS
    )
    for name, item in sorted(ctx.config.suite.items()) if examples is not None else ():
        task = open_item(ctx, item)
        with ctx.progress(len(task), f"questions of {name}") as progress:
            results[name], rows = evaluate_task(
                engine, task, answering, work=ctx.work / "tasks" / name, on_progress=progress.update,
                should_stop=ctx.should_stop, stop=ctx.stop,
            )  # fmt: skip
        assert examples is not None
        examples += [{"task": name, **row} for row in rows]
        ctx.metrics[name] = results[name].accuracy
    return record_suite(ctx, results)
