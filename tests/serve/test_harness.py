"""Our models in lm-evaluation-harness give the numbers of our own engine."""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.engine.generate import Engine
from mlxchat.model.gpt import GPT
from serve.servers import BASE

lm_eval = pytest.importorskip("lm_eval")
QUESTIONS = ["the cat sat", "a dog is", "the mat and the"]
CHOICES = [" on the mat", " here", " a cat on a mat"]
TASK = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}", "target_delimiter": ""}


@pytest.fixture
def tasks(tmp_path: Path) -> list[dict[str, Any]]:
    """Multiple choice, a generated answer, and the perplexity of a text."""
    file = tmp_path / "rows.jsonl"
    rows = [{"question": text, "choices": CHOICES, "answer": 0} for text in QUESTIONS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path / "cache")}}
    return [
        {**task, "task": "choice", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}",
         "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}]},
        {**task, "task": "text", "output_type": "generate_until", "doc_to_target": "{{choices[0]}}",
         "generation_kwargs": {"until": ["zzz"], "max_gen_toks": 6}, "metric_list": [{"metric": "exact_match"}]},
        {**task, "task": "bytes", "output_type": "loglikelihood_rolling", "doc_to_text": "",
         "doc_to_target": "{{question * 40}}", "metric_list": [{"metric": "bits_per_byte"}]},
    ]  # fmt: skip


def evaluate(model: Any, tasks: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=model, tasks=tasks, bootstrap_iters=0, log_samples=True, verbosity="ERROR", **options
    )
    return found


def responses(found: dict[str, Any], task: str) -> list[Any]:
    return [sample["resps"] for sample in sorted(found["samples"][task], key=lambda sample: sample["doc_id"])]


def log_probabilities(model: GPT, ids: list[int]) -> np.ndarray[Any, Any]:
    """Return the log-probability of each id but the first, from the logits of the whole in NumPy."""
    logits = np.asarray(model.logits(model.hidden(mx.array([ids])))[0], np.float64)[:-1]
    logits -= logits.max(1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    return logits[np.arange(len(logits)), ids[1:]]


def test_scores_are_the_models_own(served, model, tokenizer, tasks):
    from mlxchat.evals.harness import HarnessModel

    found = evaluate(HarnessModel(path="pretrain", outputs=str(served)), tasks)
    for question, told in zip(QUESTIONS, responses(found, "choice"), strict=True):
        start = [tokenizer.bos, *tokenizer.encode(question)]
        for choice, ((value, greedy),) in zip(CHOICES, told, strict=True):
            ids = [tokenizer.bos, *tokenizer.encode(question + choice)]
            wanted = log_probabilities(model, ids)[len(start) - 1 :].sum()
            assert float(value) == pytest.approx(wanted, abs=1e-3)
            assert str(greedy) == "False"
    end, prompts = tokenizer.bos, [[tokenizer.bos, *tokenizer.encode(question)] for question in QUESTIONS]
    answers = [each.text(tokenizer) for each in Engine(model, tokenizer).complete(prompts, max_new_tokens=6)]
    assert [told[0][0] for told in responses(found, "text")] == answers
    # Texts are longer than the context: each window begins with the last token of the one before.
    nats = size = 0.0
    for question in QUESTIONS:
        ids, most = tokenizer.encode(question * 40), model.sizes.context_tokens
        assert len(ids) > most
        nats -= log_probabilities(model, [end, *ids[:most]])[:most].sum()
        size += len((question * 40).encode())
        for first in range(most, len(ids), most):
            window = ids[max(0, min(len(ids), first + most) - most - 1) : first + most]
            new = len(ids[first : first + most])
            nats -= log_probabilities(model, window)[-new:].sum()
    assert found["results"]["bytes"]["bits_per_byte,none"] == pytest.approx(nats / size / math.log(2), rel=1e-5)


def test_server_gives_lm_evals_client_the_same_answers(start, served, tasks):
    from mlxchat.evals.harness import HarnessModel

    own = evaluate(HarnessModel(path="pretrain", outputs=str(served)), tasks[1:2])
    with start() as server:
        arguments = {
            "model": "pretrain", "base_url": f"{server.url}/v1/completions", "max_retries": 1, "max_length": 128,
            "tokenizer": str(served / "store" / BASE), "tokenized_requests": False,
        }  # fmt: skip
        text = evaluate("local-completions", tasks[1:2], model_args=arguments)
    assert responses(text, "text") == responses(own, "text")
