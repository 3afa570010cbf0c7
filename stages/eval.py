"""Eval: measure a checkpoint on held-out text, a base model on CORE, and one that can chat on the suite of tasks.

Counterpart of nanochat's base_eval.py and chat_eval.py. Options: conf/settings/eval.yaml, conf/core/, conf/suite/.
Every finished batch of questions is kept under ctx.work, so that a killed evaluation continues from there.
"""

import json
from typing import Any

from mlxchat.data.mixture import open_item
from mlxchat.data.packing import DocumentRows, take_validation
from mlxchat.data.sources import Corpus
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.tokens import open_documents
from mlxchat.engine.generate import Engine
from mlxchat.evals.bpb import text_loss, uniform_bits_per_byte
from mlxchat.evals.chat import Answering, evaluate_task
from mlxchat.evals.core import measure_core
from mlxchat.evals.examples import write_examples
from mlxchat.evals.forecast import memory
from mlxchat.evals.ngram import ngram_bits_per_byte, texts_of_rows
from mlxchat.evals.own import measure_own
from mlxchat.evals.plain_choice import measure_plain_choice
from mlxchat.evals.rank_model import language_model, text_model
from mlxchat.evals.samples import answer_prompts, continue_prompts
from mlxchat.evals.scores import Score, record_suite
from mlxchat.evals.text import measure_text
from mlxchat.evals.throughput import measure_throughput
from mlxchat.model.checkpoint import load_for_inference
from mlxchat.model.gpt import GPT
from mlxchat.ops.device import prepare_machine
from mlxchat.planning.memory import forward_tokens
from mlxchat.runner.context import Context
from mlxchat.store.files import Records

VERSION = 8
CONFIG = ["suite", "eval"]
READS_IF = {
    "suite": "chat",
    "eval.max_new_tokens": "chat",
    "eval.seeds": "chat",
    "eval.temperature": "chat",
    "eval.top_k": "chat",
    "eval.core": "base",
    "eval.base_tasks": "base",
    "eval.bpb_tokens": "corpus",
}
INPUTS = {"checkpoint": "checkpoint"}
OPTIONAL_INPUTS = {"corpus": "corpus"}
PRODUCES = "scores"
FORECAST = "mlxchat.evals.forecast"
OUTPUTS = ["scores.json", "examples.parquet"]
METRICS = {
    "val_bpb": "minimize if corpus",
    "perplexity": "minimize if corpus",
    "text_bpb": "minimize if eval.text",
    "text_perplexity": "minimize if eval.text",
    "core": "maximize if base and eval.core and not eval.core.tasks",
    "{suite}": "maximize if chat",
    "{eval.base_tasks}": "maximize if base",
    "own_{eval.own}": "neither",
    "mean_centered": "maximize if chat and suite",
    "chatcore": "maximize if chat and chatcore",
    "ngram_bpb": "neither if corpus",
    "untrained_bpb": "neither if corpus",
    "core_examples_per_second": "maximize if base and eval.core",
    "prefill_tokens_per_second": "maximize",
    "decode_tokens_per_second": "maximize",
    "model_peak_memory_bytes": "minimize",
}
RESOURCES = ["gpu"]


def run(ctx: Context) -> None:
    config = ctx.config.eval
    dtype = prepare_machine(ctx.config.machine)
    model, tokenizer, facts = load_for_inference(ctx.inputs["checkpoint"], dtype)
    chats = facts["format"] == "chat"
    throughput = measure_throughput(model)
    rows = memory(ctx.config, ctx.stage, model.sizes).on(ctx.config.machine, ask_mlx=True).rows(ctx.step)
    engine = Engine(model, tokenizer, max_rows=rows, team=ctx.team)
    examples: list[dict[str, Any]] = []
    scores: dict[str, Any] = {
        "bpb": _measure_text(ctx, model, tokenizer) if "corpus" in ctx.inputs else None,
        "core": None if chats else _measure_core(ctx, model, tokenizer, examples),
        **_measure_tasks(ctx, engine, examples if chats else None),
        "pass_at_k": None,
    }
    if not chats and config.base_tasks:
        scores["tasks"] = measure_plain_choice(
            ctx, language_model(ctx.team, model, padding=tokenizer.bos), tokenizer,
            batch_tokens=forward_tokens(ctx.config.machine, model.sizes), examples=examples,
        )  # fmt: skip
    if config.text is not None:
        scores["text"] = measure_text(
            ctx, text_model(ctx.team, model), tokenizer, tokenizer.token_bytes,
            context_tokens=model.sizes.context_tokens, micro_tokens=forward_tokens(ctx.config.machine, model.sizes),
        )  # fmt: skip
    if config.own:
        scores["own"] = measure_own(engine, config.own)
        ctx.metrics |= {f"own_{name}": value for name, value in scores["own"].items()}
    if chats:
        samples = answer_prompts(engine, config.prompts, config.max_new_tokens)
    else:
        samples = continue_prompts(
            engine,
            config.prompts,
            config.max_new_tokens,
            temperature=config.temperature or 0.0,
            top_k=config.top_k,
            seed=ctx.seed("samples"),
        )
    observed = Records(ctx.out / "samples.jsonl")  # for the report: the prompts are no part of the key
    for prompt, text in samples:
        observed.append({"prompt": prompt, "text": text})
    # In the manifest, as all that differs from time to time; scores.json is the same whenever it is made.
    ctx.metrics |= throughput
    write_examples(ctx.out / "examples.parquet", examples)
    (ctx.out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


def _measure_text(ctx: Context, model: GPT, tokenizer: Tokenizer) -> dict[str, float]:
    """Return how well the validation text is predicted, also by others than the model."""
    corpus, context_tokens = ctx.inputs["corpus"], model.sizes.context_tokens
    documents = open_documents(ctx, "validation", tokenizer, once=True)
    rows = take_validation(
        DocumentRows(documents, context_tokens, buffer_documents=1000), row_tokens=context_tokens,
        tokens=ctx.config.eval.bpb_tokens, setting="eval.bpb_tokens",
    )  # fmt: skip
    micro_tokens = forward_tokens(ctx.config.machine, model.sizes)
    loss = text_loss(text_model(ctx.team, model), rows, tokenizer.token_bytes, micro_tokens=micro_tokens)
    ngram = ngram_bits_per_byte(Corpus.open(corpus).documents("train"), texts_of_rows(rows, tokenizer))
    bpb = {
        "val": loss.bits_per_byte, "perplexity": loss.perplexity, "tokens": loss.num_tokens, "ngram_order2": ngram,
        "untrained": uniform_bits_per_byte(rows, tokenizer.token_bytes),
    }  # fmt: skip
    names = {"val": "val_bpb", "perplexity": "perplexity", "ngram_order2": "ngram_bpb", "untrained": "untrained_bpb"}
    ctx.metrics |= {names[key]: value for key, value in bpb.items() if key in names}
    return bpb


def _measure_core(
    ctx: Context, model: GPT, tokenizer: Tokenizer, examples: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Return the base model's results on CORE's tasks, and add its examples."""
    batch_tokens = forward_tokens(ctx.config.machine, model.sizes)
    asked = language_model(ctx.team, model, padding=tokenizer.bos)
    return measure_core(ctx, asked, tokenizer, batch_tokens=batch_tokens, examples=examples)


def _measure_tasks(ctx: Context, engine: Engine, examples: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Return the scores of the suite's tasks, and add their examples; None: the model cannot chat."""
    config, results = ctx.config.eval, dict[str, Score]()
    temperature = float(config.seeds > 1) if config.temperature is None else config.temperature
    chosen = sorted(ctx.config.suite.items()) if examples is not None else []
    # All at first, so that a task that cannot be judged on this machine ends the step before any answer.
    tasks = {name: open_item(ctx, item) for name, item in chosen}
    for name, task in tasks.items():
        assert examples is not None
        answering = Answering(
            batch_rows=config.batch_rows, batch_tokens=forward_tokens(ctx.config.machine, engine.model.sizes),
            max_new_tokens=config.max_new_tokens, seeds=config.seeds, temperature=temperature, top_k=config.top_k,
            seed=ctx.seed(f"answers/{name}"),
        )  # fmt: skip
        answers = len(task) * (config.seeds if task.kind == "generative" else 1)
        with ctx.progress(answers, f"questions of {name}") as progress:
            results[name], rows = evaluate_task(
                engine, task, answering, work=ctx.work / "tasks" / name, on_progress=progress.update,
                should_stop=ctx.should_stop, stop=ctx.stop,
            )  # fmt: skip
        examples += [{"task": name, **row} for row in rows]
        ctx.metrics[name] = results[name].accuracy
    return record_suite(ctx, results)
