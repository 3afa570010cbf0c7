"""Eval: measure a checkpoint on held-out text and, once it can chat, on the suite of tasks.

Counterpart of nanochat's base_eval.py and chat_eval.py. Options: conf/settings/eval.yaml, conf/suite/.
"""

import json

from mlxchat.data.encoded import open_documents
from mlxchat.data.mixture import load_item
from mlxchat.data.packing import DocumentRows, take_rows
from mlxchat.data.shards import iterate_documents
from mlxchat.engine.generate import Engine
from mlxchat.evals.bpb import bits_per_byte, uniform_bits_per_byte
from mlxchat.evals.chat import evaluate_task, mean_centered
from mlxchat.evals.ngram import ngram_bits_per_byte
from mlxchat.evals.samples import answer_prompts, continue_prompts
from mlxchat.model.checkpoint import load_checkpoint
from mlxchat.runner.context import Context
from mlxchat.training.loop import prepare_machine
from mlxchat.training.micro_batch import forward_tokens

VERSION = 2
CONFIG = ["suite", "eval"]
INPUTS = {"checkpoint": "checkpoint"}
OPTIONAL_INPUTS = {"corpus": "corpus"}
PRODUCES = "scores"
OUTPUTS = ["scores.json", "examples.jsonl"]
RESOURCES = ["gpu"]


def run(ctx: Context) -> None:
    config, machine = ctx.config.eval, ctx.config.machine
    prepare_machine(machine)
    model, tokenizer, facts = load_checkpoint(ctx.inputs["checkpoint"])
    engine = Engine(model, tokenizer)
    scores: dict[str, object] = {"checkpoint": ctx.input_steps["checkpoint"], "bpb": None, "pass_at_k": None}

    if "corpus" in ctx.inputs:
        corpus, context_tokens = ctx.inputs["corpus"], model.sizes.context_tokens
        stream = DocumentRows(open_documents(ctx, "validation", tokenizer), context_tokens, buffer_documents=1000)
        rows = take_rows(stream, max(1, config.bpb_tokens // context_tokens))
        micro_tokens = forward_tokens(machine, model.sizes)
        bpb = {
            "val": bits_per_byte(model, rows, tokenizer.token_bytes, micro_tokens=micro_tokens),
            "ngram_order2": ngram_bits_per_byte(
                iterate_documents(corpus, "train"), iterate_documents(corpus, "validation")
            ),
            "untrained": uniform_bits_per_byte(rows, tokenizer.token_bytes),
        }
        scores["bpb"] = bpb
        ctx.metrics |= {"val_bpb": bpb["val"], "ngram_bpb": bpb["ngram_order2"], "untrained_bpb": bpb["untrained"]}

    results = {}
    (ctx.out / "examples.jsonl").touch()
    chats = facts["format"] == "chat"
    for name, item in ctx.config.suite.items() if chats else ():
        task = load_item(item)
        with ctx.progress(len(task), f"questions of {name}") as progress:
            results[name], examples = evaluate_task(
                engine,
                task,
                batch_rows=config.batch_rows,
                max_new_tokens=config.max_new_tokens,
                on_progress=progress.update,
            )
        with (ctx.out / "examples.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"task": name, **example}) + "\n" for example in examples)
        ctx.metrics[name] = results[name].accuracy
    mean = mean_centered(list(results.values()))
    scores["tasks"] = {name: score.to_dict() for name, score in results.items()}
    scores["mean_centered"] = mean
    if mean is not None:
        ctx.metrics["mean_centered"] = mean
    answer = answer_prompts if chats else continue_prompts
    samples = answer(model, tokenizer, config.prompts, config.max_new_tokens)
    scores["samples"] = [{"prompt": prompt, "text": text} for prompt, text in samples]
    (ctx.out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
