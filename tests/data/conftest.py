"""A small tokenizer, and a corpus of short documents."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from kit.text import DOCUMENTS
from mlxchat.data.bpe import train_tokenizer
from mlxchat.data.sources import Corpus, Shard, write_shards
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.tokens import Documents, encode_shard

TEXT = """the a cat dog sat on mat and then we saw 12 or 345 café naïve 你好 don't I'll x = y ; ( ) whether weather
another other brother mother rather gather number under thunder wonder \n"""
WORDS = TEXT.split(" ")


def text_of(num_words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([text_of(200, seed) for seed in range(20)], 320)


@pytest.fixture(scope="session")
def make_corpus(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(documents: list[str], *, validation: int = 1, shard: int = 40, row_group: int = 7) -> Path:
        """Write a corpus folder; row groups and shards are small, so that positions cross their borders."""
        folder = tmp_path_factory.mktemp("corpus")
        write_shards(
            folder, documents, validation_documents=validation, shard_documents=shard, row_group_documents=row_group
        )
        return folder

    return make


@pytest.fixture(scope="session")
def hundred(make_corpus: Callable[..., Path]) -> Path:
    """DOCUMENTS, 10 of them for validation; 90 for training in shards of 40, 40 and 10, row groups of 7."""
    return make_corpus(DOCUMENTS, validation=10, shard=40, row_group=7)


@pytest.fixture(scope="session")
def corpus(make_corpus: Callable[..., Path]) -> Path:
    """Two hundred documents of 1 to 60 words."""
    return make_corpus([text_of(random.Random(seed).randint(1, 60), seed) for seed in range(200)], validation=20)


@pytest.fixture(scope="session")
def read_documents(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Documents]:
    """Return a new cursor over a split of a corpus; each shard is encoded once per session."""
    made: dict[Shard, Path] = {}

    def obtain(shard: Shard, is_awaited: bool, check: Callable[[], None]) -> Path:
        if shard not in made:
            folder = tmp_path_factory.mktemp("tokens")
            encode_shard(shard, tokenizer, folder, threads=1)
            made[shard] = folder
        return made[shard]

    def read(corpus: Path, split: str = "train", **options: bool) -> Documents:
        return Documents(Corpus.open(corpus).shards(split), obtain, **options)

    return read
