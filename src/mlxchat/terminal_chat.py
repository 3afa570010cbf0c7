"""A conversation in the terminal: streaming, several turns, tool calls shown. A base model continues text instead."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from mlxchat.data.conversation import Conversation, render_for_completion
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.generate import Engine
from mlxchat.errors import ConfigError
from mlxchat.model.checkpoint import load_checkpoint
from mlxchat.ops import blas

_HELP = "/reset forgets the conversation, /temp T sets the temperature, /tokens N the longest answer, /quit leaves"
_DIM, _PLAIN = "\033[2m", "\033[0m"


@dataclass
class Chat:
    """A model, its settings and the conversation so far."""

    engine: Engine
    name: str
    temperature: float
    top_k: int | None
    max_tokens: int
    seed: int
    continues: bool = False
    """Whether it is a base model, which was never taught to converse: it continues what it is given."""
    messages: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path, *, temperature: float, top_k: int | None, max_tokens: int, seed: int) -> Chat:
        """Load a checkpoint artifact.

        Raises:
            ConfigError: a setting is impossible.
            DataError: the checkpoint cannot be read.
        """
        if temperature < 0 or max_tokens < 1 or (top_k is not None and top_k < 1):
            raise ConfigError("--temperature must be at least 0, --max-tokens and --top-k at least 1")
        model, tokenizer, facts = load_checkpoint(folder)
        blas.set_blas_threads(1)
        continues = facts.get("format") != "chat"
        return cls(Engine(model, tokenizer), folder.name, temperature, top_k, max_tokens, seed, continues)

    def answer_once(self, prompt: str) -> None:
        """Print the answer to one question, or a text with its continuation; '-' reads it from standard input."""
        self._reply(sys.stdin.read().strip() if prompt == "-" else prompt)

    def converse(self) -> None:
        """Read questions and commands until /quit or the end of the input."""
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter

        print(f"{self.name}{' continues what you write' if self.continues else ''}. {_HELP}.")
        commands = WordCompleter(["/reset", "/temp", "/tokens", "/help", "/quit"], sentence=True)
        session: PromptSession[str] | None = PromptSession(completer=commands) if sys.stdin.isatty() else None
        while True:
            try:
                text = (session.prompt("text › " if self.continues else "you › ") if session else input()).strip()
            except (EOFError, KeyboardInterrupt):
                return
            if text.startswith("/"):
                if text in ("/quit", "/exit"):
                    return
                print(self.obey(text))
            elif text:
                self._reply(text)

    def obey(self, command: str) -> str:
        """Carry out a slash command; return what to say."""
        name, _, value = command.partition(" ")
        try:
            if name == "/reset":
                self.messages.clear()
                return "the conversation is forgotten"
            if name == "/temp":
                temperature = float(value)
                if not 0 <= temperature <= 10:
                    raise ValueError
                self.temperature = temperature
                return f"temperature {self.temperature:g}"
            if name == "/tokens":
                tokens = int(value)
                if tokens < 1:
                    raise ValueError
                self.max_tokens = tokens
                return f"at most {self.max_tokens} tokens per answer"
        except ValueError:
            return f'"{command}": expected a number, as in /temp 0.7 or /tokens 200'
        return _HELP if name == "/help" else f"there is no {name}; {_HELP}"

    def _reply(self, text: str) -> None:
        """Continue the text, or answer it and remember question and answer."""
        tokenizer = self.engine.tokenizer
        if self.continues:
            sys.stdout.write(text)
            self._stream([tokenizer.bos, *tokenizer.encode(text)][-self._room() :])
            return
        self.messages.append({"role": "user", "content": text})
        answer = self._stream(render_for_completion(tokenizer, self._fitting()))
        self.messages.append({"role": "assistant", "content": answer})

    def _stream(self, prompt: list[int]) -> str:
        """Print what the model says after a prompt, as it comes; return it."""
        printer = StreamPrinter(self.engine.tokenizer, styled=sys.stdout.isatty())
        self.seed += 1
        for column in self.engine.stream(
            [prompt],
            max_new_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            seed=self.seed,
        ):
            printer.add(column[0][1])
        printer.finish()
        return printer.text

    def _room(self) -> int:
        """Return how many tokens may stand before an answer in the context."""
        return max(1, self.engine.model.sizes.context_tokens - self.max_tokens)

    def _fitting(self) -> Conversation:
        """Return the latest turns that leave room for an answer in the context."""
        room = self._room()
        messages = list(self.messages)
        while len(messages) > 1 and len(render_for_completion(self.engine.tokenizer, {"messages": messages})) > room:
            messages = messages[2:]
        return {"messages": messages}


class StreamPrinter:
    """Prints tokens as they come: never half a UTF-8 character, tool calls dimmed as <<2*3=6>>."""

    def __init__(self, tokenizer: Tokenizer, *, styled: bool) -> None:
        """Begin a line."""
        self.text = ""
        self._tokenizer, self._styled = tokenizer, styled
        self._pending = b""
        self._shown = {
            tokenizer.special_ids["<|python_start|>"]: (_DIM if styled else "") + "<<",
            tokenizer.special_ids["<|python_end|>"]: "=",
            tokenizer.special_ids["<|output_end|>"]: ">>" + (_PLAIN if styled else ""),
        }
        self._special = set(tokenizer.special_ids.values())
        self.began = time.perf_counter()

    def add(self, token: int) -> None:
        """Print a token as far as its characters are complete."""
        if token in self._special:
            shown = self._shown.get(token, "")
            self._write(shown)
            return
        self._pending += self._tokenizer.decode_bytes([token])
        try:
            text, self._pending = self._pending.decode(), b""
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                text, self._pending = self._pending.decode(errors="replace"), b""
            else:
                text, self._pending = self._pending[: error.start].decode(), self._pending[error.start :]
        self.text += text
        self._write(text)

    def finish(self) -> None:
        """End the line."""
        self._write(self._pending.decode(errors="replace") + (_PLAIN if self._styled else "") + "\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
