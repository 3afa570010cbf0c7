"""Bits per byte from logits in NumPy, of the corpus and of any text, and the n-gram baseline with dictionaries."""

import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kit import artifacts
from kit.artifacts import publish
from kit.commands import Say
from kit.models import make_model, make_tokenizer
from kit.numpy_gpt import numpy_logits
from mlxchat.data.packing import IGNORED, Row
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.evals.bpb import mean_loss, ngram_bits_per_byte, text_loss
from mlxchat.model.checkpoint import save_checkpoint
from mlxchat.model.gpt import GPT
from mlxchat.model.scoring import ScoredRow, continuation, row_of, score_rows
from mlxchat.ops import device
from mlxchat.ops.loss import ScoreKind


@pytest.fixture
def rows(tokenizer: Tokenizer) -> list[Row]:
    """Seven rows of 20: text, special tokens and bytes that are no UTF-8; some targets are ignored."""
    rng, made = np.random.default_rng(0), []
    for _ in range(7):
        ids = rng.integers(0, tokenizer.vocab_size, 21).astype(np.int32)
        ids[rng.integers(0, 21, 3)] = tokenizer.bos
        targets = np.where(rng.random(20) < 0.3, IGNORED, ids[1:]).astype(np.int32)
        made.append((ids[:-1], targets))
    assert sum(target >= tokenizer.bos for _, targets in made for target in targets) > 5
    return made


def losses(model: GPT, row: Row) -> np.ndarray:
    """Return −log softmax of each target in nats, in float64; 0 where it is ignored."""
    logits = np.asarray(model(mx.array(row[0][None])), dtype=np.float64)[0]
    logsumexp = np.log(np.exp(logits - 15).sum(-1)) + 15
    return np.where(row[1] >= 0, logsumexp - logits[np.arange(20), np.maximum(row[1], 0)], 0)


def raw_bytes(tokenizer: Tokenizer, row: Row) -> np.ndarray:
    """Return the bytes of each target, by spelling it."""
    targets = row[1].tolist()
    return np.array([len(tokenizer.decode_bytes([each])) if 0 <= each < tokenizer.bos else 0 for each in targets])


@pytest.mark.parametrize("micro_tokens", [1, 50, 10_000])
def test_loss_counts_text_only_and_the_mean_all_tokens(model, tokenizer, rows, micro_tokens):
    counted = [(losses(model, row), raw_bytes(tokenizer, row)) for row in rows]
    nats = sum((values * (sizes > 0)).sum() for values, sizes in counted)
    found = text_loss(model, rows, tokenizer.token_bytes, micro_tokens=micro_tokens)
    # Losses are float32.
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / sum(s.sum() for _, s in counted), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / sum((s > 0).sum() for _, s in counted)), rel=1e-4)
    expected = sum(values.sum() for values, _ in counted) / sum((row[1] >= 0).sum() for row in rows)
    assert mean_loss(model, rows, micro_tokens=micro_tokens) == pytest.approx(expected, rel=1e-5)


TRAINING = ["the cat sat on the mat.", "the dog sat; naïve café!", "on and on and on", "x"]
HELD_OUT = ["the cat and the dog", "zebra ünseen", "on"]


def slow_bits_per_byte(training: list[str], held_out: list[str]) -> float:
    """Witten-Bell: P(c | context) = (count + kinds × P(c | shorter context)) / (total + kinds)."""

    def to_bytes(documents: list[str]) -> bytes:
        return b"\0\0" + b"\0".join(document.encode() for document in documents)

    train, test = to_bytes(training), to_bytes(held_out)
    followers: dict[bytes, Counter[int]] = defaultdict(Counter)
    for order in (0, 1, 2):
        for end in range(order, len(train)):
            followers[train[end - order : end]][train[end]] += 1

    def probability(context: bytes, byte: int) -> float:
        lower = probability(context[1:], byte) if context else 1 / 256
        seen = followers.get(context)
        if not seen:
            return lower
        return (seen[byte] + len(seen) * lower) / (seen.total() + len(seen))

    bits = [-math.log2(probability(test[end - 2 : end], test[end])) for end in range(2, len(test)) if test[end]]
    return sum(bits) / len(bits)


@pytest.mark.parametrize(
    ("training", "held_out"),
    [(TRAINING, HELD_OUT), (TRAINING, TRAINING), (["a"], HELD_OUT), ([""], HELD_OUT), ([], ["a"])],
)
def test_bits_per_byte_equal_a_slow_model(training, held_out):
    assert ngram_bits_per_byte(training, held_out) == pytest.approx(slow_bits_per_byte(training, held_out), rel=1e-9)


# The last one is longer than the context of 64 tokens.
DOCUMENTS = ["The house in the garden.", "It isn't so.", "", "12 windows had the house in the garden. " * 12]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("text") / "outputs"
    model, tokenizer = artifacts.make_model("jul2026", context_tokens=64), make_tokenizer()
    publish(place, "base", lambda out: save_checkpoint(out, model, tokenizer, {"stage": "pretrain", "format": "base"}))
    return place


def measured(say: Say, outputs: Path, *arguments: object) -> dict[str, Any]:
    said = say("eval", "base", "--text", *arguments, "--json", "eval.prompts=[]", f"outputs={outputs}")
    found: dict[str, Any] = json.JSONDecoder().raw_decode(said)[0]
    return {**found["text"], "artifact": found["artifact"]}


def numpy_sums() -> tuple[list[float], list[int], int]:
    """Return nats and bytes of each document, and tokens of all: rows of 64 after the token before them, in float64."""
    model, tokenizer = artifacts.make_model("jul2026", context_tokens=64), make_tokenizer()
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
        found = measured(say, outputs, tmp_path / name, "eval.text_column=story")
        assert {**found, "artifact": folder["artifact"]} == folder
    (tmp_path / "folder" / "0.md").write_text("The house in the gardens.")
    assert measured(say, outputs, tmp_path / "folder")["artifact"] != folder["artifact"]


# `score_rows`: the scores of each row alone, from all logits in NumPy


KINDS: tuple[ScoreKind, ...] = ("losses", "entropies", "logits", "likeliest")
OTHERS = {
    "gpt2": {"n_ctx": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "layer_norm_epsilon": 1e-5,
             "vocab_size": 80},
    "mamba": {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 64, "state_size": 4, "num_hidden_layers": 2,
              "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 2},
}  # fmt: skip


def rows_of(vocab_size: int) -> list[ScoredRow]:
    """Return continuations of several lengths, one of them empty, a row of ignored targets, and one of choices."""
    rng = np.random.default_rng(0)
    rows = [continuation(rng.integers(0, vocab_size, n).tolist(), s) for n, s in [(30, 4), (7, 7), (61, 20), (9, 1)]]
    ids = rng.integers(0, vocab_size, 41).astype(np.int32)
    rows.append(row_of(ids[:-1], np.where(rng.random(40) < 0.5, ids[1:], -1).astype(np.int32)))
    return [*rows, ScoredRow(ids, np.full(3, 40), np.array([5, 70, 6], np.int32))]


def expected(logits: np.ndarray[Any, Any], row: ScoredRow) -> np.ndarray[Any, Any]:
    """Return the four scores (4, n) from the logits (T, V) of a row, in float64."""
    logits = logits[row.places]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = (np.arange(len(log_p)), row.targets)
    return np.stack([-log_p[chosen], -(np.exp(log_p) * log_p).sum(-1), logits[chosen], logits.argmax(-1)])


@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
@pytest.mark.parametrize("batch_tokens", [1, 130, 4096])
def test_scores_equal_those_of_each_row_alone(path, architecture, batch_tokens):
    model, rows = make_model(architecture, num_layers=3, scale=0.3), rows_of(280)
    for row, found in zip(rows, score_rows(model, rows, KINDS, batch_tokens=batch_tokens), strict=True):
        wanted = expected(numpy_logits(model, row.ids[None])[0], row)
        np.testing.assert_allclose(found, wanted, atol=5e-5)  # float32
    assert score_rows(model, rows, batch_tokens=batch_tokens)[1].shape == (1, 0)


@pytest.mark.parametrize("kind", list(OTHERS))
def test_scores_of_third_party_architectures(kind):
    module = pytest.importorskip(f"mlx_lm.models.{kind}")
    mx.random.seed(3)
    model = module.Model(module.ModelArgs.from_dict({"model_type": kind, **OTHERS[kind]}))
    rows = rows_of(80)
    for row, found in zip(rows, score_rows(model, rows, KINDS, batch_tokens=200), strict=True):
        wanted = expected(np.asarray(model(mx.array(row.ids[None]))[0], np.float64), row)
        np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("batch_tokens", [1, 300])
def test_passes_respect_the_token_limit(monkeypatch, kind, batch_tokens):
    """On an NVIDIA GPU lengths are multiples of 128 and heights powers of two, so that few shapes are planned."""
    model, shapes, hidden = make_model(), list[tuple[int, ...]](), GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, ids, *rest: shapes.append(ids.shape) or hidden(self, ids, *rest))
    if kind == "cuda":
        monkeypatch.setenv("MLXCHAT_CPU", "plain")
    monkeypatch.setattr(device, "backend", lambda: kind)
    monkeypatch.setattr(mx, "compile", lambda function: function)
    rows = [continuation([1] * length, length - 1) for length in range(3, 40, 2)]
    found = score_rows(model, rows, batch_tokens=batch_tokens)
    assert all(values.shape == (1, 1) for values in found)
    assert sum(height for height, _ in shapes) >= len(rows)
    assert all(height == 1 or height * width <= batch_tokens for height, width in shapes)
    if kind == "cuda":
        assert all(width % 128 == 0 for _, width in shapes)
