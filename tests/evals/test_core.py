"""CORE from a bundle: results, resuming, cropping, standard errors, and what is refused."""

import io
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.models import make_model
from kit.numpy_gpt import numpy_logits
from kit.text import core_items, write_bundle
from mlxchat.bench.core import answer_alone
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.errors import DataError, Interrupted
from mlxchat.evals.core import CoreResult, evaluate_core, likeliest, mean_losses
from mlxchat.evals.core_bundle import Bundle
from mlxchat.evals.core_questions import Question, build_question
from mlxchat.evals.examples import read_examples, write_examples
from mlxchat.evals.language_model import OwnModel
from mlxchat.model.gpt import GPT
from mlxchat.runner.progress import Progress

KINDS = {
    "choice": ("multiple_choice", 2, 25),
    "schema": ("schema", 0, 50),
    "language": ("language_modeling", 1, 0),
    "story": ("language_modeling", 0, 0),
}
ENTRY = (
    "icl_tasks:\n- {{label: {}, icl_task_type: multiple_choice, num_fewshot: [{}], dataset_uri: all/choice.jsonl}}\n"
)
Evaluate = Callable[..., CoreResult]


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
    def run(**options: Any) -> CoreResult:
        given = {
            "bundle": bundle, "max_per_task": None, "tasks": None, "batch_tokens": 300, "work": tmp_path / "work",
            "progress": lambda total, unit: Progress("core", total, unit, stream=io.StringIO()),
        }  # fmt: skip
        return evaluate_core(OwnModel(model), tokenizer, **{**given, **options})

    return run


def zipped(bundle: Path) -> Path:
    path = bundle.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as file:
        for each in sorted(bundle.rglob("*")):
            file.write(each, each.relative_to(bundle))
    return path


def test_verdicts_equal_those_of_single_examples(evaluate, model, tokenizer, bundle):
    result, opened = evaluate(), Bundle(bundle)
    for task in opened.tasks:
        items = opened.examples(task)
        expected = [answer_alone(model, tokenizer, task, items, index) for index in range(len(items))]
        got = [example["verdict"] for example in result.examples if example["task"] == f"core/{task.label}"]
        assert got == expected, task.label


def test_core_is_the_mean_of_centred_accuracies(evaluate):
    result = evaluate()
    centered, variances = [], []
    for label, (_, _, percent) in KINDS.items():
        verdicts = [each["verdict"] for each in result.examples if each["task"] == f"core/{label}"]
        accuracy, baseline = np.mean(verdicts), percent / 100
        assert result.to_dict()["tasks"][label]["accuracy"] == pytest.approx(accuracy, abs=1e-12)
        centered.append((accuracy - baseline) / (1 - baseline))
        variances.append(accuracy * (1 - accuracy) / len(verdicts) / (1 - baseline) ** 2)
    assert result.core == pytest.approx(np.mean(centered), abs=1e-12)
    assert result.stderr == pytest.approx(math.sqrt(sum(variances)) / 4, abs=1e-12)
    some = evaluate(tasks=["schema", "choice"])
    assert [score.task.label for score in some.scores] == ["choice", "schema"]
    assert (some.core, some.stderr) == (None, None)


def test_zip_and_folder_give_equal_results(evaluate, bundle, tmp_path):
    from_folder = evaluate().to_dict()
    from_zip = evaluate(bundle=zipped(bundle), work=tmp_path / "other").to_dict()
    assert from_zip.pop("bundle_sha256") != from_folder.pop("bundle_sha256")
    assert from_zip == from_folder


def test_verdicts_do_not_depend_on_the_batch(evaluate, tmp_path):
    assert evaluate(batch_tokens=60).to_dict() == evaluate(batch_tokens=9000, work=tmp_path / "other").to_dict()


@pytest.mark.parametrize("batches", [0, 2])
def test_stopped_evaluation_resumes_with_equal_results(evaluate, tmp_path, batches):
    left = iter([False] * batches)
    with pytest.raises(Interrupted, match="CORE's task"):
        evaluate(should_stop=lambda: next(left, True), max_per_task=10)
    whole = evaluate(max_per_task=10, work=tmp_path / "other")
    continued = evaluate(max_per_task=10)
    assert 0 < continued.computed < whole.computed
    assert (continued.to_dict(), continued.examples) == (whole.to_dict(), whole.examples)


def test_results_of_another_bundle_are_not_reused(evaluate, bundle):
    first = evaluate(max_per_task=6)
    path = bundle / "eval_bundle" / "eval_data" / "all" / "schema.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in core_items("schema", 6)))
    second = evaluate(max_per_task=6)
    assert second.computed == first.computed == 24


def set_context(model: GPT, bundle_evaluate: Evaluate) -> tuple[int, int]:
    """Give a model a context that half of the prompts exceed; return it, and the number of longer prompts."""
    tokens = sorted(example["tokens"] for example in bundle_evaluate(tasks=["language"]).examples)
    limit = tokens[len(tokens) // 2]
    object.__setattr__(model.sizes, "context_tokens", limit)
    return limit, sum(count > limit for count in tokens)


@pytest.mark.parametrize(("rule", "counted"), [("extend", "extended"), ("cut", "cropped")])
def test_long_prompts_are_counted(evaluate, model, rule, counted):
    limit, longer = set_context(model, evaluate)
    result = evaluate(tasks=["language"], long_prompts=rule).to_dict()
    found = result["tasks"]["language"]
    assert found[counted] == longer > 0
    assert found["extended"] + found["cropped"] == longer
    assert (result["long_prompts"], result["context_tokens"]) == (rule, limit)
    other = evaluate(tasks=["language"], long_prompts="cut" if rule == "extend" else "extend")
    assert other.computed > 0, "results under another rule are not reused"


def test_third_party_models_keep_their_limit(model, tokenizer, bundle, tmp_path, evaluate):
    class Bounded(OwnModel):
        extends = False

    limit, longer = set_context(model, evaluate)
    result = evaluate_core(
        Bounded(model), tokenizer, bundle, max_per_task=None, tasks=["language"], batch_tokens=300,
        work=tmp_path / "bounded", progress=lambda total, unit: Progress("core", total, unit, stream=io.StringIO()),
    )  # fmt: skip
    assert (result.long_prompts, result.scores[0].cropped, result.scores[0].extended) == ("cut", longer, 0)
    assert max(example["tokens"] for example in result.examples) == limit


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


@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
def test_long_prompts_exceed_the_context_as_in_nanochat(evaluate, tokenizer, bundle, tmp_path, architecture):
    """Guards against cut prompts, and against layers of July 2026 that see further back than the context (64)."""
    model = make_model(architecture, num_layers=3, scale=0.3, seed=5)
    described = bundle / "eval_bundle" / "core.yaml"
    described.write_text(described.read_text().replace('"num_fewshot": [', '"num_fewshot": [1'))  # 10 to 12 shots
    result = evaluate_core(
        OwnModel(model), tokenizer, bundle, max_per_task=14, tasks=None, batch_tokens=2000, work=tmp_path / "work",
        progress=lambda total, unit: Progress("core", total, unit, stream=io.StringIO()),
    )  # fmt: skip
    opened, found = Bundle(bundle), {(each["task"], each["index"]): each for each in result.examples}
    for task in opened.tasks:
        items = opened.examples(task, 14)
        for index in range(4):
            example = found[f"core/{task.label}", index]
            verdict, losses = numpy_verdict(model, build_question(task, items, index, tokenizer))
            assert example["verdict"] == verdict
            if "losses" in example["details"]:
                np.testing.assert_allclose(example["details"]["losses"], losses, rtol=1e-5)
    assert all(score.extended == score.num_examples for score in result.scores)
    assert max(example["tokens"] for example in result.examples) > 2 * 64


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("core.yaml", "icl_tasks: [{label: x}]", "do not describe tasks"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\n", "do not describe tasks"),
        ("eval_data/all/choice.jsonl", '{"query": "a"}\n', "choice.jsonl line 1.*no choices, gold"),
        ("eval_data/all/choice.jsonl", '{"query": "a", "choices": ["b"], "gold": 1}\n', "gold is 1 of 1"),
        ("eval_data/all/choice.jsonl", "nonsense\n", "choice.jsonl line 1"),
        ("eval_data/all/choice.jsonl", "[1]\n", "choice.jsonl line 1.*not an object"),
        ("eval_data/all/choice.jsonl", "[" * 100_000, "choice.jsonl line 1"),
        ("eval_data/all/choice.jsonl", '{"query": "a", "choices": {"0": 1}, "gold": 0}\n', "options are not a list"),
        ("eval_data/all/choice.jsonl", '{"query": "a", "choices": ["b", "c"], "gold": 1.0}\n', "gold is 1.0 of 2"),
        ("eval_data/all/choice.jsonl", '{"query": "\udcff"}\n', "choice.jsonl line 1.*utf-8"),
        ("core.yaml", "icl_tasks: []", "names no task"),
        ("core.yaml", ENTRY.format("../../out", 0), r"called '\.\./\.\./out'"),
        ("core.yaml", ENTRY.format("choice", -1), "-1 shots"),
        ("core.yaml", f"{ENTRY.format('choice', 0)}{ENTRY.format('choice', 0).partition(chr(10))[2]}", "several tasks"),
        (
            "eval_meta_data.csv",
            "Eval Task,Random baseline\n" + "".join(f"{x},100\n" for x in KINDS),
            "baseline of 100 %",
        ),
        ("eval_meta_data.csv", "Eval Task,Random baseline\nchoice," + "9" * 200_000, "do not describe tasks"),
    ],
    ids=str,
)
def test_damaged_bundle_is_refused_with_its_place(evaluate, bundle, path, text, message):
    (bundle / "eval_bundle" / path).write_text(text, encoding="utf-8", errors="surrogateescape")
    if "../out" in text:
        with (bundle / "eval_bundle" / "eval_meta_data.csv").open("a") as file:
            file.write("\n../../out,25")
    with pytest.raises(DataError, match=message):
        evaluate()


def damaged(path: Path, change: Callable[[bytearray, int], None]) -> Path:
    """Change a zip where the directory's entry of a data file begins."""
    content = bytearray(path.read_bytes())
    change(content, content.rfind(b"PK\x01\x02", 0, content.rfind(b"eval_data/all/choice.jsonl")))
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content, entry: content.__setitem__(slice(entry + 24, entry + 28), (600 << 20).to_bytes(4, "little")),
         "629,145,600 bytes, expected at most"),
        (lambda content, entry: content.__setitem__(entry + 10, 99), "compression"),
        (lambda content, entry: content.__setitem__(entry + 8, 1), "encrypted"),
    ],
    ids=["a bomb", "packed in an unknown way", "encrypted"],
)  # fmt: skip
def test_zip_bombs_and_unreadable_members_are_refused(evaluate, bundle, change, message):
    """A zip of 3 MB that holds 3 GB of blanks once took 8 GB of memory."""
    with pytest.raises(DataError, match=message):
        evaluate(bundle=damaged(zipped(bundle), change), tasks=["choice"])


def test_unpaired_surrogates_become_question_marks(evaluate, bundle, tmp_path):
    lines = [json.dumps({"query": f"the \ud800 cat {place}", "choices": ["a", "b"], "gold": 0}) for place in range(5)]
    (bundle / "eval_bundle" / "eval_data" / "all" / "choice.jsonl").write_text("\n".join(lines))
    result = evaluate(tasks=["choice"])
    write_examples(tmp_path / "examples.parquet", [each | {"seed": None} for each in result.examples])
    assert all("the ? cat" in row["prompt"] for row in read_examples(tmp_path))
    assert evaluate(tasks=["choice"]).computed == 0, "the journal was read"


def test_wrong_options_are_refused(evaluate, tmp_path):
    with pytest.raises(DataError, match="at least 3 per task"):
        evaluate(max_per_task=2)
    with pytest.raises(DataError, match=r"'chioce'.* Did you mean \"choice\""):
        evaluate(tasks=["chioce"])
    (tmp_path / "file.zip").write_text("no zip")
    for path in (tmp_path / "file.zip", tmp_path / "absent.zip", tmp_path):
        with pytest.raises(DataError, match=r"eval_bundle|eval bundle"):
            evaluate(bundle=path)


def test_bundle_cannot_read_outside_its_folder(bundle, tmp_path):
    (tmp_path / "secret.jsonl").write_text("{}\n")
    path = bundle / "eval_bundle" / "core.yaml"
    path.write_text(path.read_text().replace("all/choice.jsonl", "../../../secret.jsonl"))
    opened = Bundle(bundle)
    with pytest.raises(DataError, match="leads out"):
        opened.examples(opened.tasks[0])


def test_ties_and_options_without_scored_tokens():
    losses = [np.array([1.0, 2.0]), np.array([1.5]), np.array([])]
    assert mean_losses(losses) == [1.5, 1.5, None]
    assert likeliest([1.5, 1.5, None]) == 0
    assert likeliest([2.0, None, 1.0]) == 2
    assert likeliest([None, 1.0]) == 0
