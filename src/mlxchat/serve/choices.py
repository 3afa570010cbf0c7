"""One choice of an answer while it is generated, and its fields in OpenAI's API."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from mlxchat.engine.batch import Event
from mlxchat.engine.generate import content_of
from mlxchat.engine.third_party import AnyTokenizer
from mlxchat.engine.tools import Kind
from mlxchat.serve.answers import (
    AnswerMessage,
    ChatChoice,
    ChatLogprob,
    ChatLogprobs,
    FinishReason,
    Part,
    TextChoice,
    TextLogprobs,
    Usage,
    Valued,
)
from mlxchat.serve.worker import Answer

Scored = tuple[Event, Kind, int]
"""A token with its log-probability, its kind, and its offset in the choice's text, in characters."""


@dataclass
class Choice:
    """A choice up to its newest event."""

    tokenizer: AnyTokenizer
    position: int = 0
    """Offset of the next token in the choice's text, in characters."""
    texts: list[tuple[Kind, str]] = field(default_factory=list)
    events: list[Scored] = field(default_factory=list)
    newest: list[Scored] = field(default_factory=list)
    """What the last event added to `events`."""
    num_sampled: int = 0
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        """Create the decoder."""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, event: Event) -> list[tuple[Kind, str]]:
        """Add an event; return the new (kind, text) to show."""
        self.num_sampled += event.sampled
        special = self._is_special(event.token)
        scored = event.logprob is not None and (event.finish_reason is not None or not special)
        self.newest = [(event, event.kind, self.position)] if scored else []
        self.events += self.newest
        if event.token is not None:
            data = b"" if special else self.tokenizer.decode_bytes([event.token])
            self.position += len(self._decoder.decode(data, final=special))
        if event.finish_reason is not None:
            self.finish_reason = "length" if event.finish_reason == "length" else "stop"
        new = [(event.kind, event.text)] if event.text else []
        self.texts += new
        return new

    def for_chat(self, index: int) -> ChatChoice:
        """Return the choice of a chat completion; its message has `parts` if it used a tool."""
        assert self.finish_reason is not None
        text = "".join(text for kind, text in self.texts if kind == "text")
        message: AnswerMessage = {"role": "assistant", "content": text, "refusal": None}
        parts = content_of(self.texts)
        if any(part["type"] != "text" for part in parts):
            message["parts"] = cast(list[Part], parts)
        return {
            "index": index, "message": message, "logprobs": self.chat_logprobs(self.events),
            "finish_reason": self.finish_reason,
        }  # fmt: skip

    def for_text(self, index: int) -> TextChoice:
        """Return the choice of a text completion; its text includes tool calls and their results."""
        assert self.finish_reason is not None
        return {
            "index": index, "text": "".join(text for _, text in self.texts),
            "logprobs": self.text_logprobs(self.events), "finish_reason": self.finish_reason,
        }  # fmt: skip

    def chat_pieces(self, event: Event) -> Iterator[dict[str, Any]]:
        """Add an event; yield the fields of its chunks in a chat's stream."""
        shown = self.add(event)
        logprobs = self.chat_logprobs(self.newest)
        for kind, text in shown or ([("text", "")] if logprobs else []):
            delta = {"content": text} if kind == "text" else {"part": {"type": kind, "text": text}}
            yield {"delta": delta, "logprobs": logprobs}
            logprobs = None
        if self.finish_reason:
            yield {"delta": {}, "finish_reason": self.finish_reason}

    def text_pieces(self, event: Event) -> Iterator[dict[str, Any]]:
        """Add an event; yield the fields of its chunk in a text's stream."""
        text = "".join(text for _, text in self.add(event))
        logprobs = self.text_logprobs(self.newest)
        if text or logprobs or self.finish_reason:
            yield {"text": text, "logprobs": logprobs, "finish_reason": self.finish_reason}

    def chat_logprobs(self, found: list[Scored]) -> ChatLogprobs | None:
        """Return the log-probabilities of the text tokens among `events` or `newest`."""
        entries = [
            self._chat_entry(each) for each, kind, _ in found if kind == "text" and not self._is_special(each.token)
        ]
        return {"content": entries, "refusal": None} if entries else None

    def text_logprobs(self, found: list[Scored]) -> TextLogprobs | None:
        """Return log-probabilities in the form of text completions, including tool calls and the end token.

        `text_offset` is each token's offset in the choice's whole text, in characters, also in a stream's chunks.
        Tokens that share a character share its offset.
        """
        if not found:
            return None
        return {
            "tokens": [self._token(each.token) for each, _, _ in found],
            "token_logprobs": [each.logprob for each, _, _ in found],
            "top_logprobs": [
                None if each.top_logprobs is None else {self._token(id_): value for id_, value in each.top_logprobs}
                for each, _, _ in found
            ],
            "text_offset": [position for _, _, position in found],
        }

    def _is_special(self, token: int | None) -> bool:
        return token in self.tokenizer.special_ids.values()

    def _chat_entry(self, event: Event) -> ChatLogprob:
        top = [self._valued(id_, value) for id_, value in event.top_logprobs or ()]
        return {**self._valued(event.token, event.logprob), "top_logprobs": top}

    def _valued(self, token: int | None, logprob: float | None) -> Valued:
        data = b"" if token is None else self.tokenizer.decode_bytes([token])
        return {"token": self._token(token), "logprob": logprob, "bytes": list(data)}

    def _token(self, token: int | None) -> str:
        r"""Return a token's text; incomplete UTF-8 in OpenAI's notation, such as bytes:\xe2\x96."""
        data = b"" if token is None else self.tokenizer.decode_bytes([token])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def choices_of(answer: Answer) -> list[Choice]:
    """Return the empty choices of an answer."""
    return [Choice(answer.model.tokenizer) for _ in answer.requests]


def usage_of(answer: Answer, choices: list[Choice], each: int) -> Usage:
    """Return OpenAI's usage: a prompt counts once for its `each` choices; tokens forced by tools do not count."""
    prompt = sum(len(request.prompt) for request in answer.requests[::each])
    completion = sum(choice.num_sampled for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
