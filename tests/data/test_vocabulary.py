"""Imported vocabularies: the source's ids and split pattern, with our special tokens after them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxchat.composition.compose import compose_config
from mlxchat.data.bpe import train_tokenizer
from mlxchat.data.tokenizer import Tokenizer, load_vocabulary
from mlxchat.data.vocabulary import (
    GPT2_PATTERN,
    GPT4_PATTERN,
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    hf_pattern_of,
    vocab_size_of,
)
from mlxchat.errors import ConfigError, DataError

tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "The quick brown fox, didn't it jump? I'LL say 12345 times we've 3.14 apples.\n\n  indented\tcode(x)",
    "whether the weather gathers another mother; under thunder numbers 678 90 wonder! naïve café 你好 Привет",
] * 20
# Letters and marks that the Unicode tables of both libraries contain.
ESTABLISHED = st.characters(max_codepoint=0x4FF, blacklist_categories=("Cn", "Cs"), blacklist_characters="\u0149\u017f")
WORDLIKE = st.lists(
    st.sampled_from(
        ["the", " the", "weather", "'s", "'LL", "12", "3456", "\n", "\n\n", "  ", " ", "\t", "!", "é", "你"]
    )
).map("".join)


def train_hf(pre_tokenizer: Any) -> Any:
    """Return a tokenizer that the `tokenizers` library trained, with a special token at the end."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = pre_tokenizer
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420, special_tokens=[], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(TEXTS, trainer)
    made.add_special_tokens(["<|endoftext|>"])
    return made


def split_by(pattern: str) -> Any:
    pre = tokenizers.pre_tokenizers
    return pre.Sequence([
        pre.Split(tokenizers.Regex(hf_pattern_of(pattern)), "isolated"),
        pre.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip


CUTS: dict[str, tuple[Callable[[], Any], str]] = {
    "gpt2": (lambda: tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), GPT2_PATTERN),
    "gpt4": (lambda: split_by(GPT4_PATTERN), hf_pattern_of(GPT4_PATTERN)),
    "ours": (lambda: split_by(SPLIT_PATTERN), SPLIT_PATTERN),
}


@pytest.fixture(scope="module", params=CUTS)
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer, Path]:
    """Return a source, the tokenizer imported from its file, and the folder where it is saved."""
    make, pattern = CUTS[request.param]
    source, folder = train_hf(make()), tmp_path_factory.mktemp("taken")
    source.save(str(folder / "source.json"))
    ours, keeps_ids = load_vocabulary(str(folder / "source.json"))
    ours.save(folder)
    assert (keeps_ids, ours.pattern) == (True, pattern)
    return source, ours, folder


@given(text=st.text(alphabet=ESTABLISHED) | WORDLIKE)
def test_imported_and_saved_vocabularies_encode_as_the_source(imported, text):
    source, ours, folder = imported
    saved = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert ours.encode(text) == source.encode(text).ids == saved.encode(text).ids
    assert ours.decode(ours.encode(text)) == text
    assert {name: saved.token_to_id(name) for name in SPECIAL_TOKENS} == ours.special_ids


def test_import_keeps_pattern_and_replaces_special_tokens(imported):
    source, ours, folder = imported
    for loaded in (Tokenizer.load(folder), load_vocabulary(str(folder))[0]):
        assert (loaded.pattern, loaded.ranks, loaded.digest) == (ours.pattern, ours.ranks, ours.digest)
    assert vocab_size_of(str(folder)) == ours.vocab_size == source.get_vocab_size() - 1 + 9
    assert list(ours.special_ids.values()) == list(range(len(ours.ranks), len(ours.ranks) + 9))
    assert max(ours.encode("<|endoftext|><|bos|>")) < ours.bos


def test_added_words_are_refused(tmp_path):
    source = train_hf(CUTS["gpt2"][0]())
    source.add_tokens(["Quellbrunn"])
    source.save(str(tmp_path / "source.json"))
    with pytest.raises(DataError, match="it matches 'Quellbrunn' before any merges"):
        load_vocabulary(str(tmp_path / "source.json"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("gtp2", r'"gtp2" is not a file or folder, nor one of train, gpt2, cl100k\. Did you mean "gpt2"\?'),
        ("/no/such/file.json", "is not a file or folder"),
        ("FOLDER", "is not a vocabulary: expected a .tiktoken file"),
    ],
)
def test_wrong_source_is_one_line_at_planning(tmp_path, source, expected):
    with pytest.raises(ConfigError, match=expected) as caught:
        compose_config([f"tokenizer.source={source.replace('FOLDER', str(tmp_path))}"])
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith("tokenizer.source: ")


def test_vocab_size_follows_the_source(tmp_path):
    train_tokenizer(TEXTS, 300).save(tmp_path)
    config = compose_config([f"tokenizer.source={tmp_path}", "tokenizer.vocab_size=777"]).config
    assert config.tokenizer.vocab_size == 300
    train_tokenizer(TEXTS, 310).save(tmp_path)  # the same command line, which has been composed before
    assert compose_config([f"tokenizer.source={tmp_path}"]).config.tokenizer.vocab_size == 310
