"""Encoded text: token files, order and positions of documents, encoding on demand, sharing between steps."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit import training
from kit.text import DOCUMENTS
from mlxchat.config.schema import TaskItem
from mlxchat.data import tokens as tokens_module
from mlxchat.data.bpe import train_tokenizer
from mlxchat.data.sources import Corpus, Shard
from mlxchat.data.tokenizer import Tokenizer, render_conversation
from mlxchat.data.tokens import Documents, Mixture, Tokens, encode_shard, open_documents, open_mixture
from mlxchat.errors import ConfigError
from mlxchat.runner.context import Context
from mlxchat.store.manifest import MANIFEST, describe_outputs
from mlxchat.store.store import SharedArtifacts, Store


def lists(tokens: Tokens) -> list[list[int]]:
    return [tokens.ids(index).tolist() for index in range(len(tokens))]


@given(st.lists(st.lists(st.integers(0, 299), max_size=9), max_size=9), st.booleans())
def test_saved_tokens_are_opened_unchanged(tmp_path_factory, sequences, masks):
    folder = tmp_path_factory.mktemp("tokens")
    pairs = [(ids, [token % 2 == 0 for token in ids] if masks else None) for ids in sequences]
    Tokens.of(pairs, 300).save(folder)
    tokens = Tokens.open(folder)
    assert lists(tokens) == sequences
    assert tokens.lengths(0, len(tokens)) == [len(ids) for ids in sequences]
    if masks and sequences:
        assert [tokens.trained(index).tolist() for index in range(len(tokens))] == [mask for _, mask in pairs]
    with pytest.raises(ValueError, match="read-only"):
        tokens.flat[:] = 5


# Documents


def texts(documents: Documents, count: int, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(documents.ids(address)[1:].tolist()) for address, _ in documents.next(count)]


@pytest.mark.parametrize("count", [1, 7, 64])
def test_documents_repeat_in_order_and_count_epochs(hundred, read_documents, tokenizer, count):
    documents, found = read_documents(hundred), []
    while len(found) < 200:
        found += texts(documents, count, tokenizer)
        assert documents.epoch == (len(found) - 1) // 90
    assert documents.name((1, 3)) == "shard_00001.parquet document 3"
    assert found == (DOCUMENTS[10:] * 3)[: len(found)]


def test_the_next_shard_is_encoded_in_the_background(hundred, tokenizer, tmp_path):
    asked: list[tuple[str, bool]] = []

    def encode(shard: Shard, is_awaited: bool, check: Callable[[], None]) -> Path:
        asked.append((Path(shard.name).stem, is_awaited))
        folder = tmp_path / Path(shard.name).stem
        folder.mkdir()
        encode_shard(shard, tokenizer, folder, threads=1, check=check)
        return folder

    documents = Documents(Corpus.open(hundred).train, encode)
    assert asked == [], "nothing is encoded before the first document is read"
    documents.next(1)
    documents._worker.join()
    documents.next(1)
    documents.close()
    assert asked == [("shard_00000", True), ("shard_00001", False)]


# Artifacts


@pytest.fixture
def make_context(corpus: Path, tmp_path: Path) -> Callable[..., Context]:
    """Return the context of a step that reads a copy of the corpus as an artifact."""

    def make(place: str = "corpus") -> Context:
        folder = tmp_path / place
        if not folder.exists():
            shutil.copytree(corpus, folder)
            (folder / MANIFEST).write_text(json.dumps({"outputs": describe_outputs(corpus)[0]}))
        outputs = tmp_path / "outputs"
        Store(outputs).prepare()
        ctx = training.make_context(tmp_path)
        ctx.inputs["corpus"] = folder
        ctx.encoded = SharedArtifacts(outputs=outputs, run="run", inputs={}, facts=dict, say=print).obtain
        return ctx

    return make


def names(tmp_path: Path) -> list[str]:
    return sorted(folder.name.rpartition("-")[0] for folder in (tmp_path / "outputs" / "store").iterdir())


def test_step_reads_the_documents_of_its_corpus(make_context, corpus, tokenizer, tmp_path):
    documents = open_documents(make_context(), "train", tokenizer)
    got = [documents.ids(address).tolist() for address, _ in documents.next(180)]
    documents.close()
    assert got == [[tokenizer.bos, *tokenizer.encode(text)] for text in Corpus.open(corpus).documents("train")]
    assert names(tmp_path) == [f"tokens-shard_0000{index}" for index in range(5)]


def test_tokens_are_shared_by_text_and_tokenizer(make_context, tokenizer, tmp_path, monkeypatch):
    def read(place: str, by: Tokenizer) -> None:
        open_documents(make_context(place), "validation", by).next(1)

    read("corpus", tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(tokens_module, "encode_shard", pytest.fail)
        tokenizer.save(tmp_path)
        read("elsewhere", Tokenizer.load(tmp_path))
    read("corpus", train_tokenizer(["the cat sat on the mat " * 9], 270))
    assert names(tmp_path) == ["tokens-validation", "tokens-validation"]


def test_mixture_is_rendered_exactly_and_once(make_context, tokenizer, monkeypatch):
    items = {"arithmetic": TaskItem(task="arithmetic", size=20), "kinds": TaskItem(task="kinds_mc", size=5)}
    mixture = Mixture(items, seed=1)
    tokens = open_mixture(make_context(), "mixture", mixture, tokenizer)
    rendered = [render_conversation(tokenizer, conversation, None) for conversation in mixture]
    assert lists(tokens) == [ids for ids, _ in rendered]
    assert [tokens.trained(index).tolist() for index in range(25)] == [
        [bit == 1 for bit in mask] for _, mask in rendered
    ]
    monkeypatch.setattr(tokens_module, "render_conversation", None)
    assert lists(open_mixture(make_context(), "mixture", mixture, tokenizer)) == lists(tokens)


# Mixtures: epochs, weights, slices, order by seed


def write_questions(folder: Path, count: int) -> str:
    """Write a file of the questions q0, q1, …; return its path."""
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": "a"}) + "\n" for i in range(count)))
    return str(path)


@pytest.fixture
def items(tmp_path: Path) -> dict[str, TaskItem]:
    """Three lines of a file twice over, and five conversations of a bundled task."""
    path = write_questions(tmp_path, 3)
    return {
        "mine": TaskItem(task="jsonl", path=path, epochs=2, options={"held_out_frac": 0.0}),
        "sums": TaskItem(task="arithmetic", size=5),
    }


def questions(mixture: Mixture) -> list[str]:
    return [mixture[index]["messages"][0]["content"] for index in range(len(mixture))]


def test_epochs_repeat_conversations_and_the_seed_shuffles_them(items):
    first, same, other = (questions(Mixture(items, seed=seed)) for seed in (1, 1, 2))
    counts = Counter(first)
    assert {key: counts.pop(key) for key in ("q0", "q1", "q2")} == {"q0": 2, "q1": 2, "q2": 2}
    assert sum(counts.values()) == 5
    assert first == same != other
    assert sorted(first) == sorted(other)
    mine = [question in ("q0", "q1", "q2") for question in first]
    assert mine not in (sorted(mine), sorted(mine, reverse=True)), "tasks are mixed"


def test_empty_slices_are_refused(tmp_path):
    item = TaskItem(task="identity_conversations", path=write_questions(tmp_path, 1), start=5)
    with pytest.raises(ConfigError, match="no conversation of mine is left"):
        Mixture({"mine": item, "sums": TaskItem(task="arithmetic", size=5)}, seed=0)


def test_weights_divide_the_total_size(tmp_path):
    mine = TaskItem(task="identity_conversations", path=write_questions(tmp_path, 4), weight=3.0)
    mixture = Mixture({"mine": mine, "sums": TaskItem(task="arithmetic", size=12, weight=1.0)}, seed=0)
    assert mixture.counts() == {"mine": 12, "sums": 4}
    asked = Counter(questions(mixture))
    assert [asked[f"q{i}"] for i in range(4)] == [3, 3, 3, 3]


def test_a_given_order_learns_one_task_after_the_other(items):
    for order in (["sums", "mine"], ["mine", "sums"]):
        mixture = Mixture(items, seed=0, order=order)
        tasks = [mixture.task_of(index) for index in range(len(mixture))]
        assert tasks == [name for name in order for _ in range({"mine": 6, "sums": 5}[name])]
        asked = [question for question in questions(mixture) if question.startswith("q")]
        assert asked == 2 * asked[:3], "twice in the task's own order"
        assert sorted(asked[:3]) == ["q0", "q1", "q2"]
