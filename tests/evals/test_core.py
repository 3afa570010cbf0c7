"""CORE: prompts against jinja2, results from a bundle, resuming, cropping, standard errors, refusals."""

import math
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.models import make_model
from kit.numpy_gpt import numpy_logits
from kit.text import core_items, write_bundle
from kit.training import make_context
from mlxchat.config.schema import CoreConfig
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.generate import Engine
from mlxchat.errors import DataError, Interrupted
from mlxchat.evals.core import (
    Bundle,
    CoreTask,
    Question,
    build_question,
    draw_shots,
    evaluate_core,
    render_prompts,
    tokenize_prompts,
)
from mlxchat.model.gpt import GPT

KINDS = {
    "choice": ("multiple_choice", 2, 25),
    "schema": ("schema", 0, 50),
    "language": ("language_modeling", 1, 0),
    "story": ("language_modeling", 0, 0),
}
Result = tuple[dict[str, Any], list[dict[str, Any]]]
Evaluate = Callable[..., Result]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle with a task of each kind, as a folder."""
    tasks = {
        label: (kind, shots, baseline, core_items(kind, 23, story=label == "story"))
        for label, (kind, shots, baseline) in KINDS.items()
    }
    return write_bundle(tmp_path / "bundle" / "eval_bundle", tasks).parent


@pytest.fixture
def evaluate(model: GPT, tokenizer: Tokenizer, bundle: Path, tmp_path: Path) -> Evaluate:
    def run(
        batch_tokens: int = 1500, path: Path = bundle, is_ours: bool = True, work: str = "work", stop_after: int = 999,
        max_per_task: int | None = None, model: GPT = model, **core: Any,
    ) -> Result:  # fmt: skip
        engine = Engine(model, tokenizer, batch_tokens=batch_tokens)
        engine.is_ours = is_ours
        left = iter([None] * stop_after)
        ctx = make_context(tmp_path, stop_signal=lambda: next(left, 15))
        config = CoreConfig(bundle=str(path), **core)
        return evaluate_core(ctx, engine, config, max_per_task=max_per_task, work=tmp_path / work)

    return run


def zipped(bundle: Path) -> Path:
    path = bundle.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as file:
        for each in sorted(bundle.rglob("*")):
            file.write(each, each.relative_to(bundle))
    return path


def test_core_is_the_mean_of_centred_accuracies(evaluate):
    result, examples = evaluate()
    centered, variances = [], []
    for label, (_, _, percent) in KINDS.items():
        verdicts = [each["verdict"] for each in examples if each["task"] == f"core/{label}"]
        accuracy, baseline = np.mean(verdicts), percent / 100
        assert result["tasks"][label]["accuracy"] == pytest.approx(accuracy, abs=1e-12)
        centered.append((accuracy - baseline) / (1 - baseline))
        variances.append(accuracy * (1 - accuracy) / len(verdicts) / (1 - baseline) ** 2)
    assert result["core"] == pytest.approx(np.mean(centered), abs=1e-12)
    assert result["stderr"] == pytest.approx(math.sqrt(sum(variances)) / 4, abs=1e-12)
    some, _ = evaluate(tasks=["schema", "choice"])
    assert (list(some["tasks"]), some["core"], some["stderr"]) == (["choice", "schema"], None, None)


def test_zip_and_folder_give_equal_results_in_any_batches(evaluate, bundle):
    from_folder, from_zip = evaluate(batch_tokens=60)[0], evaluate(9000, zipped(bundle), work="other")[0]
    assert from_zip.pop("bundle_sha256") != from_folder.pop("bundle_sha256")
    assert from_zip == from_folder


@pytest.mark.parametrize("batches", [0, 2])
def test_stopped_evaluation_resumes_with_equal_results(evaluate, monkeypatch, batches):
    with pytest.raises(Interrupted, match="CORE's task"):
        evaluate(batch_tokens=300, stop_after=batches, max_per_task=10)
    whole = evaluate(batch_tokens=300, max_per_task=10, work="other")
    assert evaluate(batch_tokens=300, max_per_task=10) == whole
    monkeypatch.setattr(Engine, "score", None)
    assert evaluate(batch_tokens=300, max_per_task=10) == whole


def numpy_verdict(model: GPT, question: Question) -> tuple[bool, list[float]]:
    """Return the verdict on an example and the mean loss of each option, by nanochat's transformer in float64."""
    means, predicted = [], []
    for tokens, start in zip(question.sequences, question.starts, strict=True):
        logits = numpy_logits(model, np.array([tokens]))[0]
        places = np.arange(start, len(tokens))
        losses = np.log(np.exp(logits).sum(-1))[places - 1] - logits[places - 1, np.array(tokens)[places]]
        means.append(float(losses.mean()))
        predicted.append(logits[places - 1].argmax(-1).tolist())
    if question.gold is None:
        return predicted[0] == question.sequences[0][question.starts[0] :], means
    return int(np.argmin(means)) == question.gold, means


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("core.yaml", '{"icl_tasks": [{"label": "a"}]}', "do not describe tasks"),
        ("core.yaml", "[", "do not describe tasks"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\nmine,many", "do not describe tasks"),
        ("core.yaml", None, "no name of a task"),
        ("eval_data/all/mine.jsonl", "{\n", "not JSON by lines"),
    ],
)
def test_malformed_bundle_is_one_message(tmp_path, name, text, told):
    folder = write_bundle(tmp_path, {"mine": ("language_modeling", 0, 0, [{"context": "c", "continuation": "k"}])})
    if text is None:  # a label that would be a path
        text = (folder / name).read_text().replace('"mine"', '"../../mine"')
        (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n../../mine,0")
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=told):
        Bundle(folder).examples(Bundle(folder).tasks[0])


@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
def test_long_prompts_exceed_the_context_as_in_nanochat(evaluate, tokenizer, bundle, tmp_path, architecture):
    """Guards against cut prompts, and against layers of July 2026 that see further back than the context (64)."""
    model = make_model(architecture, num_layers=3, scale=0.3, seed=5)
    described = bundle / "eval_bundle" / "core.yaml"
    described.write_text(described.read_text().replace('"num_fewshot": [', '"num_fewshot": [1'))  # 10 to 12 shots
    result, examples = evaluate(model=model, max_per_task=14, batch_tokens=2000)
    opened, found = Bundle(bundle), {(each["task"], each["index"]): each for each in examples}
    for task in opened.tasks:
        items = opened.examples(task, 14)
        for index in range(4):
            example = found[f"core/{task.label}", index]
            verdict, losses = numpy_verdict(model, build_question(task, items, index, tokenizer))
            assert example["verdict"] == verdict
            if "losses" in example["details"]:
                np.testing.assert_allclose(example["details"]["losses"], losses, rtol=1e-5)
    assert all(task["extended"] == task["num_examples"] for task in result["tasks"].values())
    assert max(example["tokens"] for example in examples) > 2 * 64


@pytest.mark.parametrize(
    ("kind", "item", "shot", "prompts"),
    [
        ("multiple_choice", {"query": "q", "choices": ["x", " y"]}, {"query": "Q", "choices": ["a", "b"], "gold": 1},
         ["Q: b\n\nq: x", "Q: b\n\nq:  y"]),
        ("schema", {"context_options": ["c", "d"], "continuation": "k"},
         {"context_options": ["C", "D"], "continuation": "K", "gold": 0}, ["C: K\n\nc: k", "C: K\n\nd: k"]),
        ("language_modeling", {"context": " c ", "continuation": "k "}, {"context": "C\n", "continuation": "K"},
         ["C: K\n\nc:", "C: K\n\nc: k "]),
    ],
    ids=["multiple_choice", "schema", "language_modeling"],
)  # fmt: skip
def test_prompts_are_nanochats(kind, item, shot, prompts):
    task = CoreTask(label="task", kind=kind, data="", num_fewshot=1, delimiter=": ", baseline=0.25)
    assert render_prompts(task, item, [shot]) == prompts


def test_shots_are_drawn_as_nanochat_does():
    for index, count, shots in ((0, 2, 1), (3, 30, 10), (29, 30, 5), (7, 400, 10)):
        others = [place for place in range(count) if place != index]
        assert draw_shots(index, count, shots) == random.Random(1234 + index).sample(others, shots)


def test_scored_spans(tokenizer):
    """Choices are scored from where they differ, schemas where they agree; "at" is one token."""
    for kind, prompts, scored in (
        ("multiple_choice", ["the cat sat", "the cat ran"], [" sat", " ran"]),
        ("schema", ["a cat sat", "a dogs sat"], [" sat", " sat"]),
        ("language_modeling", ["the ca", "the cat"], ["at"]),
    ):
        pairs = zip(*tokenize_prompts(kind, prompts, tokenizer), strict=True)
        assert [tokenizer.decode(tokens[start:]) for tokens, start in pairs] == scored
