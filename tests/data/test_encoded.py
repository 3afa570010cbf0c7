"""Artifacts of encoded text: contents, sharing, encoding on demand."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.numpy import load_file

from mlxchat.config.schema import TaskItem
from mlxchat.data import tokens as encoded_module
from mlxchat.data.bpe import train_tokenizer
from mlxchat.data.conversation import render_conversation
from mlxchat.data.mixture import Mixture
from mlxchat.data.sources import Corpus
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.tokens import encode_shard, open_documents, open_mixture
from mlxchat.errors import Interrupted
from mlxchat.runner.context import Context
from mlxchat.store.manifest import MANIFEST, describe_outputs
from mlxchat.store.shared import SharedArtifacts
from mlxchat.store.store import Store


@pytest.fixture
def make_context(corpus: Path, tmp_path: Path) -> Callable[..., Context]:
    """Return the context of a step that reads a copy of the corpus as an artifact."""

    def make(place: str = "corpus", stop_signal: Callable[[], int | None] = lambda: None) -> Context:
        folder = tmp_path / place
        if not folder.exists():
            shutil.copytree(corpus, folder)
            (folder / MANIFEST).write_text(json.dumps({"outputs": describe_outputs(corpus)[0]}))
        outputs = tmp_path / "outputs"
        Store(outputs).prepare()
        shared = SharedArtifacts(outputs=outputs, run="run", inputs={}, facts=dict, say=print)
        config: Any = SimpleNamespace()
        return Context(
            step="toy", stage="toy", config=config, inputs={"corpus": folder}, out=tmp_path / "out",
            work=tmp_path / "work", root_seed=0, stop_signal=stop_signal, on_metrics=lambda step, record: None,
            shared=shared,
        )  # fmt: skip

    return make


def names(tmp_path: Path) -> list[str]:
    return sorted(folder.name.rpartition("-")[0] for folder in (tmp_path / "outputs" / "store").iterdir())


@pytest.mark.parametrize("threads", [1, 3])
def test_encoded_shard_does_not_depend_on_threads(corpus, tokenizer, tmp_path, threads, monkeypatch):
    monkeypatch.setattr(encoded_module, "_PART_DOCUMENTS", 2)  # so that row groups of 7 make several parts
    (shard,) = Corpus.open(corpus).validation
    numbers = encode_shard(shard, tokenizer, tmp_path, threads=threads)
    expected = [[tokenizer.bos, *tokenizer.encode(text)] for text in Corpus.open(corpus).documents("validation")]
    arrays = load_file(tmp_path / "tokens.safetensors")
    assert arrays["ids"].tolist() == [token for ids in expected for token in ids]
    assert [b - a for a, b in zip(arrays["offsets"], arrays["offsets"][1:], strict=False)] == list(map(len, expected))
    assert (numbers["documents"], numbers["tokens"]) == (len(expected), len(arrays["ids"]))


def test_step_reads_the_documents_of_its_corpus(make_context, corpus, tokenizer, tmp_path):
    cursor = open_documents(make_context(), "train", tokenizer)
    got = [cursor.ids(address).tolist() for address, _ in cursor.next(180)]
    cursor.close()
    assert got == [[tokenizer.bos, *tokenizer.encode(text)] for text in Corpus.open(corpus).documents("train")]
    assert names(tmp_path) == [f"tokens-shard_0000{index}" for index in range(5)]


def test_tokens_are_shared_by_text_and_tokenizer(make_context, tokenizer, tmp_path, monkeypatch):
    def read(place: str, by: Tokenizer) -> None:
        open_documents(make_context(place), "validation", by).next(1)

    read("corpus", tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(encoded_module, "encode_shard", None)
        tokenizer.save(tmp_path)
        read("corpus", tokenizer)
        read("elsewhere", Tokenizer.load(tmp_path))
    read("corpus", train_tokenizer(["the cat sat on the mat " * 9], 270))
    assert names(tmp_path) == ["tokens-validation", "tokens-validation"]


def test_stop_signal_ends_the_encoding(make_context, tokenizer, tmp_path):
    cursor = open_documents(make_context(stop_signal=lambda: 15), "train", tokenizer)
    with pytest.raises(Interrupted, match=r"toy stopped at the encoding of shard_00000\.parquet"):
        cursor.next(1)
    assert names(tmp_path) == list((tmp_path / "outputs" / "work").iterdir()) == []


def test_mixture_is_rendered_exactly_and_once(make_context, tokenizer, monkeypatch):
    items = {"arithmetic": TaskItem(task="arithmetic", size=20), "facts": TaskItem(task="facts", size=5)}
    mixture = Mixture(items, seed=1)
    tokens = open_mixture(make_context(), "mixture", mixture, tokenizer)
    for index, conversation in enumerate(mixture):
        ids, mask = render_conversation(tokenizer, conversation, None)
        assert tokens.ids(index).tolist() == ids
        assert tokens.trained(index).tolist() == [bool(bit) for bit in mask]
    assert len(tokens) == len(mixture) == 25
    monkeypatch.setattr(encoded_module, "render_conversation", None)
    assert open_mixture(make_context(), "mixture", mixture, tokenizer).flat.tobytes() == tokens.flat.tobytes()
    with pytest.raises(TypeError):
        open_mixture(make_context(), "mixture", mixture, train_tokenizer(["the cat sat on the mat " * 9], 270))
