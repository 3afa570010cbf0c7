"""`mlxchat eval MODEL --text PATH`: every token of every document once, against NumPy."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kit.artifacts import make_model, make_tokenizer, publish
from kit.commands import Say
from kit.numpy_gpt import numpy_logits
from mlxchat.evals.bpb import ratio_error
from mlxchat.model.checkpoint import save_checkpoint

# The last one is longer than the context of 64 tokens.
DOCUMENTS = ["The house in the garden.", "It isn't so.", "", "12 windows had the house in the garden. " * 12]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("text") / "outputs"
    model, tokenizer = make_model("jul2026", context_tokens=64), make_tokenizer()
    publish(place, "base", lambda out: save_checkpoint(out, model, tokenizer, {"stage": "pretrain", "format": "base"}))
    return place


def measured(say: Say, outputs: Path, *arguments: object) -> dict[str, Any]:
    said = say("eval", "base", "--text", *arguments, "--json", "eval.prompts=[]", f"outputs={outputs}")
    found: dict[str, Any] = json.JSONDecoder().raw_decode(said)[0]
    return {**found["text"], "artifact": found["artifact"]}


def numpy_sums() -> tuple[list[float], list[int], int]:
    """Return nats and bytes of each document, and tokens of all: rows of 64 after the token before them, in float64."""
    model, tokenizer = make_model("jul2026", context_tokens=64), make_tokenizer()
    nats, num_bytes, tokens = [], [], 0
    for text in DOCUMENTS:
        ids, total = [tokenizer.bos, *tokenizer.encode(text)], 0.0
        for start in range(0, len(ids) - 1, 64):
            piece = ids[start : start + 65]
            logits = numpy_logits(model, np.array([piece[:-1]]))[0]
            total -= sum(row[target] - np.log(np.exp(row).sum()) for row, target in zip(logits, piece[1:], strict=True))
        nats, num_bytes, tokens = [*nats, total], [*num_bytes, len(text.encode())], tokens + len(ids) - 1
    return nats, num_bytes, tokens


def test_loss_of_text_equals_numpys(outputs, tmp_path, say):
    nats, num_bytes, tokens = numpy_sums()
    (tmp_path / "folder").mkdir()
    for number, text in enumerate(DOCUMENTS):
        (tmp_path / "folder" / f"{number}.md").write_text(text)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"story": text}) + "\n" for text in DOCUMENTS))
    pq.write_table(pa.table({"story": DOCUMENTS}), tmp_path / "a.parquet")
    folder = measured(say, outputs, tmp_path / "folder")
    assert (folder["tokens"], folder["bytes"], folder["documents"]) == (tokens, sum(num_bytes), 4)
    assert folder["bpb"] == pytest.approx(sum(nats) / sum(num_bytes) / math.log(2), rel=1e-5)
    assert folder["perplexity"] == pytest.approx(math.exp(sum(nats) / tokens), rel=1e-5)
    assert measured(say, outputs, tmp_path / "folder") == folder, "cached by contents"
    for name in ("a.jsonl", "a.parquet"):
        found = measured(say, outputs, tmp_path / name, "--column", "story")
        assert {**found, "artifact": folder["artifact"]} == folder
    (tmp_path / "folder" / "0.md").write_text("The house in the gardens.")
    assert measured(say, outputs, tmp_path / "folder")["artifact"] != folder["artifact"]


def test_unreadable_text_is_one_message(outputs, tmp_path, say):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "a.jsonl").write_text('{"other": 1}\n')
    for arguments, told in (
        ([tmp_path / "none.txt"], "cannot be read (No such file or directory)"),
        ([tmp_path / "empty"], "holds no files"),
        ([tmp_path / "bad.txt"], "cannot be read as UTF-8 text"),
        ([tmp_path / "a.jsonl"], 'line 1: no field "text" with text'),
    ):
        assert told in say("eval", "base", "--text", *arguments, f"outputs={outputs}", code=2)
    assert "--column requires --text" in say("eval", "base", "--task", "bpb", "--column", "x", code=2)


def test_ratio_error_of_equal_documents_is_that_of_a_mean():
    x, y = np.random.default_rng(1).normal(5, 1, 30), np.full(30, 4.0)
    assert ratio_error(x, y) == pytest.approx(np.std(x / 4, ddof=1) / math.sqrt(30))
    assert ratio_error(x[:1], y[:1]) is None
