"""mlxchat eval MODEL: one evaluation of any model, cached as a step."""

import json
from pathlib import Path

import numpy as np
import pytest

from kit.artifacts import make_model, publish
from kit.models import make_tokenizer
from kit.numpy_gpt import numpy_logits
from mlxchat.model.checkpoint import save_checkpoint
from mlxchat.tasks import load_task


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An outputs folder with a chat model and a base model."""
    outputs = tmp_path_factory.mktemp("eval") / "outputs"
    for name, form in (("talks", "chat"), ("base", "base")):
        model, tokenizer = make_model("oct2025"), make_tokenizer()
        facts = {"stage": "sft", "format": form}
        publish(outputs, name, lambda out, m=model, t=tokenizer, f=facts: save_checkpoint(out, m, t, f))
    return outputs


def evaluations(outputs: Path) -> list[Path]:
    return sorted(outputs.glob("store/eval-*"))


def test_evaluation_is_a_cached_step(made, say):
    settings = ["eval.max_new_tokens=4", f"outputs={made}"]
    latest = sorted((made / "refs" / "latest").iterdir())
    first = say("eval", "talks", "--task", "arithmetic", "--limit", "3", "--samples", "2", *settings)
    assert "eval       starts" in first
    again = say("eval", "talks", "--task", "arithmetic", "--limit", "3", "--samples", "2", *settings)
    assert again in first
    header, row = again.splitlines()[:2]
    assert header.split() == ["task", "right", "±", "any", "chance", "questions", "samples"]
    assert row.split()[0] == "arithmetic"
    assert row.split()[-2:] == ["3", "2"]
    assert len(evaluations(made)) == 1
    assert sorted((made / "refs" / "latest").iterdir()) == latest
    say("eval", "talks", "--task", "arithmetic", "--limit", "2", "--samples", "2", *settings)
    assert len(evaluations(made)) == 2, "another limit is another key"


def test_base_model_chooses_as_numpy(made, tmp_path, say):
    """Zero-shot: the option with the lowest mean loss after "Question: …" and "Answer: " as plain text, in float64."""
    said = say("eval", "base", "--task", "kinds_mc", "--limit", "10", "--json", "eval.prompts=[]", f"outputs={made}")
    found = json.JSONDecoder().raw_decode(said)[0]["tasks"]["kinds_mc_base"]
    model, tokenizer, task = make_model("oct2025"), make_tokenizer(), load_task("kinds_mc", "test")
    right = 0
    for index in range(10):
        talk = task[index]
        text = f"Question: {talk['question']}\nAnswer: "
        rows = [[tokenizer.bos, *tokenizer.encode(text + choice)] for choice in talk["choices"]]
        same = next(n for n, ids in enumerate(zip(*rows, strict=False)) if len(set(ids)) > 1)
        losses = []
        for ids in rows:
            logits = numpy_logits(model, np.array([ids]))[0][:-1]
            each = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids) - 1), ids[1:]]
            losses.append(each[same - 1 :].mean())
        right += talk["letters"][int(np.argmin(losses))] == talk["answer"]
    assert (found["accuracy"], found["num_questions"], found["chance"]) == (right / 10, 10, 0.25)


def test_mistakes_are_refused(made, say):
    for arguments, message in (
        (["talks", "--task", "gsm8k", "--limit", "0"], "--limit is 0, expected a whole number of at least 1"),
        (["talks", "--task", "gsn8k"], 'Did you mean "gsm8k"'),
        (["talks"], "expected --task TASK (core, bpb, kinds_mc"),
        (["base", "--task", "gsm8k"], "cannot answer questions: expected --task core"),
        (["talks", "--task", "core"], "CORE needs a base model"),
    ):
        assert message in say("eval", *arguments, f"outputs={made}", code=2)


def test_third_party_folder_is_evaluated(made, tmp_path, say):
    say("export", "talks", "--to", "mlx", tmp_path / "mlx", f"outputs={made}")
    settings = ["--limit", "4", "eval.max_new_tokens=4", f"outputs={made}", "--task", "kinds_mc"]
    theirs = say("eval", f"hf:{tmp_path / 'mlx'}", *settings).splitlines()
    ours = say("eval", "talks", *settings).splitlines()
    rows = [next(line for line in text if line.startswith("kinds_mc")) for text in (theirs, ours)]
    assert rows[0] == rows[1]
