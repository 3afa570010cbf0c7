"""tokenizer_*.json and conversation_*.json: training, encoding and decoding; token ids and masks of conversations."""

import base64
from collections.abc import Callable, Iterator
from typing import Any

from comparison import Comparison, Quantity, exact, same
from parity_file import ParityFile

from mlxchat.data.bpe import train_tokenizer
from mlxchat.data.conversation import render_conversation, render_for_completion
from mlxchat.data.vocabulary import SPLIT_PATTERN
from mlxchat.errors import DataError

# nanochat cuts a conversation, and a prompt too, after this many tokens. Ours keeps the end of a prompt.
_LIMIT = 2048
# nanochat demands a last message of the assistant, to leave it out. Our prompts may end with the user's.
_ACCEPTED = ("completion_last_is_user",)


def training(file: ParityFile) -> Iterator[Comparison]:
    """Compare the tokenizer that ours trains on the file's documents."""
    values, tokenizer = file.json, file.tokenizer()
    documents = [text[: values["doc_cap_chars"]] for text in values["documents"][: values["num_documents_used"]]]
    yield same("characters trained on", [("", sum(map(len, documents)), values["chars_used"])])
    trained = train_tokenizer(documents, values["vocab_size"])
    ids = {token: rank for rank, token in enumerate(trained.ranks)}
    yield same("split pattern", [("", SPLIT_PATTERN, values["split_pattern"])])
    yield same("merges", ((repr(token), ids.get(token), rank) for token, rank in tokenizer.ranks.items()))
    yield same("size of the vocabulary", [("", trained.vocab_size, values["vocab_size"])])
    yield same(
        "special tokens", ((name, trained.special_ids.get(name), id_) for name, id_ in values["special_tokens"].items())
    )
    yield same("bytes of each token", [("", trained.token_bytes.tolist(), values["token_bytes"])])


def encoding(file: ParityFile) -> Iterator[Comparison]:
    """Compare encoded texts and decoded ids."""
    values, tokenizer = file.json, file.tokenizer()
    cases = values["encode"]
    yield same(
        "ids of texts", ((repr(case["text"][:20]), tokenizer.encode(case["text"]), case["ids"]) for case in cases)
    )
    yield same(
        "texts of ids",
        [
            *(
                (str(case["ids"][:5]), tokenizer.decode(case["ids"]), case.get("decoded", case["text"]))
                for case in cases
            ),
            *((str(case["ids"][:5]), tokenizer.decode(case["ids"]), case["text"]) for case in values["decode"]),
        ],
    )
    documents = [
        case for case in values["encode_prepend_append"] if (case["prepend"], case["append"]) == ("<|bos|>", None)
    ]
    batch = values["encode_batch"]
    if (batch["prepend"], batch["append"]) == ("<|bos|>", None):
        documents += [{"text": text, "ids": ids} for text, ids in zip(batch["texts"], batch["ids"], strict=True)]
    got = tokenizer.encode_documents([case["text"] for case in documents])
    yield same(
        "documents with <|bos|>",
        ((case["text"][:20], ids.tolist(), case["ids"]) for case, ids in zip(documents, got, strict=True)),
    )


def small_corpora(file: ParityFile) -> Iterator[Comparison]:
    """Compare the merges of small corpora, which have ties or run out of pairs."""
    pairs: list[tuple[str, Any, Any]] = []
    refused: list[tuple[str, Any, Any]] = []
    for case in file.json["training_cases"]:
        if (
            case["resulting_vocab_size"] < case["vocab_size"]
        ):  # nanochat silently makes a smaller vocabulary; ours refuses
            message = _refusal(lambda case=case: train_tokenizer(case["documents"], case["vocab_size"]))
            refused.append((case["name"], f"only {case['resulting_vocab_size']} tokens" in (message or ""), True))
        tokenizer = train_tokenizer(case["documents"], case["resulting_vocab_size"])
        learned = [token for token, rank in sorted(tokenizer.ranks.items(), key=lambda item: item[1]) if rank >= 256]
        expected = ([base64.b64decode(token) for token in case["learned_base64"]], case["first_special_id"])
        pairs.append((case["name"], (learned, tokenizer.bos), expected))
    yield same("merges of small corpora", pairs)
    if refused:
        yield same("vocabularies that are too large are refused", refused)


def bytes_of_2025(file: ParityFile) -> Iterator[Comparison]:
    """Compare the bytes of each token as oct2025 counts them, from its text; ours counts the raw bytes."""
    if "token_bytes_oct2025_differences" not in file.json:
        return
    tokenizer = file.tokenizer()
    spelled = {token: len(tokenizer.decode([token]).encode()) for token in range(tokenizer.bos)}
    differing = {str(token): size for token, size in spelled.items() if size != tokenizer.token_bytes[token]}
    yield same("bytes of each token, oct2025", [("", differing, file.json["token_bytes_oct2025_differences"])])


def conversations(file: ParityFile) -> Iterator[Comparison]:
    """Compare the ids and the masks of conversations."""
    tokenizer, cases = file.tokenizer(), file.json["cases"]
    rendered = [
        (
            case["name"],
            _tried(
                lambda case=case: render_conversation(
                    tokenizer, case["conversation"], _LIMIT if case["max_tokens"] is None else case["max_tokens"]
                )
            ),
            case,
        )
        for case in cases
    ]
    yield same("ids of conversations", ((name, got and got[0], case["ids"]) for name, got, case in rendered))
    yield same("what is trained on", ((name, got and got[1], case["mask"]) for name, got, case in rendered))


def prompts(file: ParityFile) -> Iterator[Comparison]:
    """Compare prompts for the assistant's next message; of long ones, the part that nanochat keeps."""
    tokenizer, pairs, cut = file.tokenizer(), [], []
    for case in file.json["cases"]:
        expected = case.get("completion_ids")
        if expected is None:
            continue
        got = render_for_completion(tokenizer, case["conversation"])
        if len(got) <= _LIMIT:
            pairs.append((case["name"], got, expected))
        else:
            whole = [*got[:_LIMIT], tokenizer.special_ids["<|assistant_start|>"]]
            cut.append((case["name"], whole, expected))
    yield same("prompts", pairs)
    if cut:
        yield same(f"prompts beyond {_LIMIT} tokens, up to there", cut)


def refusals(file: ParityFile) -> Iterator[Comparison]:
    """Compare the refusals of invalid conversations."""
    tokenizer = file.tokenizer()
    calls = {"render_conversation": render_conversation, "render_for_completion": render_for_completion}
    differing = []
    for case in file.json["errors"]:
        refused = _refusal(lambda case=case: calls[case["call"]](tokenizer, case["conversation"])) is not None
        if refused == (case["name"] in _ACCEPTED):
            differing.append(case["name"])
    yield exact("what nanochat refuses is refused", differing, len(file.json["errors"]))


TOKENIZER: tuple[Quantity, ...] = (training, encoding, small_corpora, bytes_of_2025)
CONVERSATION: tuple[Quantity, ...] = (conversations, prompts, refusals)


def _refusal(call: Callable[[], Any]) -> str | None:
    """Return the message of a refusal, or None if nothing was refused."""
    try:
        call()
    except DataError as error:
        return str(error)
    return None


def _tried(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except DataError:
        return None
