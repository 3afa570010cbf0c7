"""What a teacher's answers become: a file of conversations, and beside it where they come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxchat.distill.answers import Answer, Answers
from mlxchat.distill.cost import Usage
from mlxchat.distill.questions import Message, Question
from mlxchat.distill.words import clean, without_thought
from mlxchat.errors import DataError, StoreError
from mlxchat.hub.cache import read_json
from mlxchat.store.files import whole_file, write_whole
from mlxchat.store.fingerprint import hash_file

# Ends of an answer that was not finished.
_CUT = ("length", "content_filter")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which answers are kept, and as what."""

    only_correct: bool = False
    keep_cut: bool = False
    """Whether answers that max_tokens cut are kept."""
    keep_thoughts: bool = False
    """Whether <think> … </think> stays."""
    system: str | None = None
    """A system prompt to keep; None: the student learns to answer without the one that the teacher got."""


@dataclass
class Tally:
    """How many answers became what."""

    kept: int = 0
    missing: int = 0
    """Not answered."""
    empty: int = 0
    cut: int = 0
    wrong: int = 0
    repeated: int = 0
    """The same answer to the same question."""
    judged: int = 0
    usage: Usage = field(default_factory=Usage)
    """Of all answers that there are."""
    models: set[str] = field(default_factory=set)
    """What the teacher called itself."""

    def describe(self) -> str:
        """Return what was left out, for people; empty: nothing."""
        counts = {
            "wrong": self.wrong, "cut off": self.cut, "empty": self.empty, "the same again": self.repeated,
            "not answered": self.missing,
        }  # fmt: skip
        return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


def choose_answers(
    questions: Sequence[Question], keys: Sequence[Sequence[str]], answers: Answers, choice: Choice, tally: Tally
) -> Iterable[dict[str, Any]]:
    """Yield a conversation for each answer that is kept, in the order of questions and samples.

    Args:
        questions: what was asked.
        keys: of each question the keys of its samples.
        answers: where the answers are.
        choice: which are kept.
        tally: counts what becomes of them.
    """
    for question, samples in zip(questions, keys, strict=True):
        seen: set[str] = set()
        for key in samples:
            if key not in answers:
                tally.missing += 1
                continue
            answer = answers[key]
            tally.usage.add(answer.tokens)
            tally.models |= {answer.model} if answer.model else set()
            content = _content_of(answer, choice)
            text = content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")
            mark = json.dumps(content)
            if not text.strip():
                tally.empty += 1
            elif answer.finish in _CUT and not choice.keep_cut:
                tally.cut += 1
            elif mark in seen:
                tally.repeated += 1
            elif not _is_right(question, text, choice, tally):
                tally.wrong += 1
            else:
                tally.kept += 1
                yield {"messages": [*_with_system(question, choice), {"role": "assistant", "content": content}]}
            seen.add(mark)


def provenance_place(out: Path) -> Path:
    """Return where the provenance of a mixture's file stands."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.provenance.json")


def find_out_problems(out: Path, *, overwrite: bool) -> list[str]:
    """Return why a file must not be written, or be written over."""
    if out.suffix != ".jsonl":
        return [f"--out is {out}, expected a file that ends in .jsonl"]
    if out.is_dir():
        return [f"--out: {out} is a folder"]
    if not out.absolute().parent.is_dir():
        return [f"--out: there is no folder {out.absolute().parent}"]
    if not out.exists() or overwrite:
        return []
    known = read_json(provenance_place(out))
    ours = [known.get("sha256"), known.get("replaces")] if isinstance(known, dict) else []
    if hash_file(out) in ours:
        return []
    return [f"--out: {out} is there and is not as mlxchat distill left it. Move it away, or add --overwrite"]


def write_mixture(out: Path, conversations: Iterable[dict[str, Any]], describe: Callable[[], dict[str, Any]]) -> None:
    """Write the conversations and their provenance, each by one rename; no conversation, no file.

    Args:
        out: the .jsonl file.
        conversations: what to write.
        describe: makes the provenance, plain data, once all conversations were taken; the file's sha256 and that of
            the file that it replaces are added.

    Raises:
        DataError: there is no conversation.
        StoreError: the disk does not take it.
    """
    try:
        with whole_file(out) as unfinished:
            digest, count = hashlib.sha256(), 0
            with unfinished.open("wb") as file:
                for conversation in conversations:
                    # Separators of lines that are no \n would cut a line for some readers.
                    text = json.dumps(conversation, ensure_ascii=False).replace("\u2028", "\\u2028")
                    text = text.replace("\u2029", "\\u2029").replace("\x85", "\\u0085")
                    line = text.encode("utf-8", "replace") + b"\n"
                    digest.update(line)
                    file.write(line)
                    count += 1
            if not count:
                raise DataError(f"no answer is left, so {out} is not written")
            replaces = hash_file(out) if out.exists() else None
            # First, with both hashes: whichever of the two files a kill leaves there is known to be ours.
            record = {**describe(), "sha256": digest.hexdigest(), "replaces": replaces}
            text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
            write_whole(provenance_place(out), text, durable=False)
    except OSError as error:
        raise StoreError(
            f"{out} cannot be written ({error.strerror}). The answers are kept: mend that and run the command again."
        ) from None


def _content_of(answer: Answer, choice: Choice) -> str | list[dict[str, str]]:
    if answer.parts is not None:
        parts = [{"type": part["type"], "text": clean(part["text"])} for part in answer.parts]
        if any(part["type"] != "text" for part in parts):
            return parts
    text = clean(answer.text)
    return (text if choice.keep_thoughts else without_thought(text)).strip()


def _is_right(question: Question, text: str, choice: Choice, tally: Tally) -> bool:
    if not choice.only_correct:
        return True
    assert question.judge is not None, "checked before anything was asked"
    tally.judged += 1
    return question.judge(text)


def _with_system(question: Question, choice: Choice) -> list[Message]:
    return with_system(question.messages, choice.system)


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """Return messages that begin with a system prompt; one that is there already is put after it."""
    if system is None:
        return messages
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{system}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": system}, *messages]
