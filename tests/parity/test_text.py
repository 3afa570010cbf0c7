"""The tokenizer: training, encoding, decoding; token ids and masks of conversations."""

import base64

import pytest

from mlxchat.data.bpe import train_tokenizer
from mlxchat.data.tokenizer import render_conversation, render_for_completion
from mlxchat.data.vocabulary import SPLIT_PATTERN
from mlxchat.errors import DataError
from parity.values import assert_same, of_files

# nanochat cuts a conversation, and a prompt too, after this many tokens. Ours keeps the end of a prompt.
LIMIT = 2048

each_tokenizer = of_files("tokenizer_*.json")
each_conversations = of_files("conversation_*.json")


@each_tokenizer
def test_trained_tokenizer(values):
    data = values.json
    documents = [text[: data["doc_cap_chars"]] for text in data["documents"][: data["num_documents_used"]]]
    assert sum(map(len, documents)) == data["chars_used"]
    trained = train_tokenizer(documents, data["vocab_size"])
    assert data["split_pattern"] == SPLIT_PATTERN
    assert {token: rank for rank, token in enumerate(trained.ranks)} == values.tokenizer.ranks
    assert trained.vocab_size == data["vocab_size"]
    assert_same((name, trained.special_ids.get(name), id_) for name, id_ in data["special_tokens"].items())
    assert trained.token_bytes.tolist() == data["token_bytes"]


@each_tokenizer
def test_encoding_and_decoding(values):
    data, tokenizer = values.json, values.tokenizer
    assert_same((case["text"], tokenizer.encode(case["text"]), case["ids"]) for case in data["encode"])
    decoded = [*data["encode"], *data["decode"]]
    assert_same((case["ids"], tokenizer.decode(case["ids"]), case.get("decoded", case["text"])) for case in decoded)
    documents = [
        case for case in data["encode_prepend_append"] if (case["prepend"], case["append"]) == ("<|bos|>", None)
    ]
    got = tokenizer.encode_documents([case["text"] for case in documents])
    assert_same((case["text"], ids.tolist(), case["ids"]) for case, ids in zip(documents, got, strict=True))


@each_tokenizer
def test_merges_of_small_corpora(values):
    """They have ties, or run out of pairs, where nanochat makes a smaller vocabulary and ours refuses."""
    for case in values.json["training_cases"]:
        if case["resulting_vocab_size"] < case["vocab_size"]:
            with pytest.raises(DataError, match=f"only {case['resulting_vocab_size']} tokens"):
                train_tokenizer(case["documents"], case["vocab_size"])
        trained = train_tokenizer(case["documents"], case["resulting_vocab_size"])
        learned = [token for token, rank in sorted(trained.ranks.items(), key=lambda each: each[1]) if rank >= 256]
        assert learned == [base64.b64decode(token) for token in case["learned_base64"]]
        assert trained.bos == case["first_special_id"]


@each_conversations
def test_ids_and_masks_of_conversations(values):
    for case in values.json["cases"]:
        most = LIMIT if case["max_tokens"] is None else case["max_tokens"]
        ids, mask = render_conversation(values.tokenizer, case["conversation"], most)
        assert (ids, mask) == (case["ids"], case["mask"]), case["name"]


@each_conversations
def test_prompts(values):
    """Of long ones, the part that nanochat keeps."""
    start = values.tokenizer.special_ids["<|assistant_start|>"]
    cases = [case for case in values.json["cases"] if case.get("completion_ids") is not None]
    got = [render_for_completion(values.tokenizer, case["conversation"]) for case in cases]
    assert_same(
        (case["name"], ids if len(ids) <= LIMIT else [*ids[:LIMIT], start], case["completion_ids"])
        for case, ids in zip(cases, got, strict=True)
    )
