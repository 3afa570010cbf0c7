"""Chat in the terminal: streaming, several turns, tool calls. A base model continues text instead."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mlxchat.data.tokenizer import fit_turns
from mlxchat.engine.batch import Kind, Request
from mlxchat.engine.generate import Engine, Scheduler, content_of
from mlxchat.engine.sample import Sampling
from mlxchat.engine.third_party import ThirdPartyEngine
from mlxchat.errors import ConfigError, DataError, StoreError, suggest, visible
from mlxchat.model.checkpoint import load_for_inference
from mlxchat.model.lora import packed_copy
from mlxchat.ops.machine import KEPT_TOKENS
from mlxchat.planning.inputs import sizes_of_folder
from mlxchat.planning.memory import Decoding, find_device

# Command → (its argument, description).
COMMANDS = {
    "/retry": ("", "answer the last question again with another seed"),
    "/edit": ("[TEXT]", "edit the last question and ask it again"),
    "/clear": ("", "forget the conversation"),
    "/system": ("[TEXT]", "set the system prompt; without text: remove it"),
    "/temperature": ("T", "0: always the most likely token"),
    "/topk": ("K", "sample among the K most likely tokens; 0: all"),
    "/tokens": ("N", "the longest answer"),
    "/seed": ("S", "seed of the next answer"),
    "/help": ("", "show this help"),
    "/quit": ("", "leave"),
}
# Command → the field of `Chat` that it sets, its type, smallest and largest value.
_NUMBERS: dict[str, tuple[str, type[float], float, float]] = {
    "/temperature": ("temperature", float, 0, 10),
    "/topk": ("top_k", int, 0, 1 << 20),
    "/tokens": ("max_tokens", int, 1, 1 << 20),
    "/seed": ("seed", int, 0, 1 << 62),
}


@dataclass
class Chat:
    """A model, its settings and the conversation."""

    engine: Engine
    name: str
    temperature: float
    top_k: int | None
    max_tokens: int
    seed: int
    continues: bool = False  # whether it is a base model, which continues text
    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    last: str | None = None  # the text that a base model continued last
    _scheduler: Scheduler | None = None

    def __post_init__(self) -> None:
        if self.continues and self.system:
            raise ConfigError(f"{self.name} continues text and knows no system prompt")

    @classmethod
    def load(cls, folder: Path, *, bits: int | None = None, **settings: Any) -> Chat:
        """Load a checkpoint artifact; `bits` quantises it, `settings` are fields of the class.

        Raises:
            ConfigError: the model does not fit into memory, or does not support a system prompt.
            DataError: the checkpoint cannot be read.
        """
        sizes = sizes_of_folder(folder)
        decoding = Decoding(
            sizes=sizes, device=find_device(), row_tokens=sizes.context_tokens, bits=bits,
            kept_tokens=KEPT_TOKENS, remedies=("--bits 4",) if bits is None else (),
        )  # fmt: skip
        decoding.rows(folder.name, most=1)
        model, tokenizer, facts = load_for_inference(folder)
        if bits is not None:
            model = packed_copy(model, bits)
        engine = Engine(model, tokenizer)
        return cls(engine, folder.name, continues=facts.get("format") != "chat", **settings)

    @classmethod
    def load_third_party(cls, folder: Path, name: str, **settings: Any) -> Chat:
        """Load a folder that mlx-lm opens; a model without chat template continues text."""
        engine = ThirdPartyEngine.load(folder)
        return cls(engine, name, continues=not engine.tokenizer.has_chat_template, **settings)

    def answer_once(self, prompt: str) -> None:
        """Print the answer to a question, or the continuation of a text; '-' reads it from standard input."""
        text = sys.stdin.read().strip() if prompt == "-" else prompt
        if not text.strip():
            raise ConfigError("the prompt is empty; expected a question, or one on standard input with -p -")
        self.ask(text)

    def converse(self) -> None:
        """Read questions and commands until /quit or the end of the input."""
        from mlxchat.terminal.chat import read_lines

        print(f"{visible(self.name)}{' continues what you write' if self.continues else ''}. /help lists the commands.")
        mark = "text › " if self.continues else "you › "
        for text, reader in read_lines(mark, COMMANDS):
            if not text.startswith("/"):
                try:
                    self.ask(text)
                except (ConfigError, DataError, StoreError) as error:
                    print(error, file=sys.stderr)
            elif text == "/quit":
                return
            elif text == "/edit" and (asked := self.last_question()) is not None:
                changed = reader(asked)
                if changed:
                    print(self.obey(f"/edit {changed}"), end="")
            else:
                said = self.obey(text)
                print(visible(said) + "\n" if said else "", end="")

    def obey(self, command: str) -> str:
        """Run a slash command; return its message."""
        name, _, value = command.partition(" ")
        if name not in COMMANDS:
            return f"there is no {name}.{suggest(name, COMMANDS)} /help lists the commands"
        try:
            if name in _NUMBERS:
                return self._set(name, value)
            act: Callable[[str], str] = getattr(self, f"_do_{name[1:]}")
            return act(value.strip())
        except ValueError:
            return f'"{command}": expected {name} {COMMANDS[name][0]}; {COMMANDS[name][1]}'
        except (ConfigError, DataError) as error:
            return str(error)

    def _set(self, name: str, value: str) -> str:
        field_name, kind, least, most = _NUMBERS[name]
        number = kind(value)
        if not least <= number <= most:
            raise ValueError
        setattr(self, field_name, None if name == "/topk" and not number else number)
        return f"{name[1:]} {number:g}"

    def ask(self, text: str) -> None:
        """Print the answer to a question, or the continuation of a text, and add both to the conversation."""
        if self.continues:
            prompt = self._beginning(text)
            self.last = text
            Shown().add("text", text)
            self._stream(prompt)
            return
        question = {"role": "user", "content": text}
        content = self._stream(self._prompt(question))
        self.messages += [question, {"role": "assistant", "content": content}]

    def last_question(self) -> str | None:
        """Return the last question or continued text."""
        asked = [message["content"] for message in self.messages if message["role"] == "user"]
        return asked[-1] if asked else self.last

    def _stream(self, prompt: list[int]) -> list[dict[str, Any]]:
        """Print the tokens after a prompt as they are generated; Ctrl-C stops. Return the answer's content."""
        if self._scheduler is None:
            self._scheduler = self.engine.scheduler(max_rows=1)
        scheduler = self._scheduler
        sampling = Sampling(temperature=self.temperature, top_k=self.top_k, seed=self.seed)
        self.seed += 1
        request = Request(
            prompt=prompt, max_new_tokens=self.max_tokens, sampling=sampling, reuse=True,
            skip_blank=isinstance(self.engine, ThirdPartyEngine) and not self.continues,
        )  # fmt: skip
        id_ = scheduler.submit(request)
        texts, shown = list[tuple[Kind, str]](), Shown()
        while not scheduler.idle:
            try:
                for event in scheduler.step():
                    if event.text:
                        texts.append((event.kind, event.text))
                        shown.add(event.kind, event.text)
            except KeyboardInterrupt:
                scheduler.cancel(id_)
        shown.finish()
        return content_of(texts)

    def _room(self) -> int:
        """Return how many tokens a prompt may have: at least half of the context."""
        return self.engine.context_tokens - min(self.max_tokens, self.engine.context_tokens // 2)

    def _note(self, what: str) -> None:
        context, room = self.engine.context_tokens, self._room()
        reason = f"the model reads {context} tokens, of which {context - room} are for the answer (--max-tokens)"
        print(f"left out {what}: {reason}", file=sys.stderr)

    def _beginning(self, text: str) -> list[int]:
        """Return the prompt of a text to continue; only its end if it is too long."""
        ids, most = self.engine.tokenizer.encode(text), self._room() - 1
        if len(ids) > most:
            self._note(f"the first {len(ids) - most} of {len(ids)} tokens of the text")
        return [self.engine.tokenizer.bos, *ids[-most:]]

    def _prompt(self, question: dict[str, Any]) -> list[int]:
        """Return the prompt of the latest turns and a question, with room for an answer; print what is dropped."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        room = self._room()
        prompt, left_out = fit_turns([*system, *self.messages, question], self.engine.render, room)
        if left_out:
            self._note("the oldest turn" if left_out == 1 else f"the {left_out} oldest turns")
        if len(prompt) > room:
            long = f"the question and the system prompt have {len(prompt)} tokens, more than {room}"
            reads = f"the model reads {self.engine.context_tokens} with its answer"
            raise ConfigError(f"{long}: {reads}. Shorten them, or the answer (/tokens)")
        return prompt

    def _do_retry(self, _: str) -> str:
        return self._do_edit(self.last_question() or "")

    def _do_edit(self, text: str) -> str:
        if self.last_question() is None:
            return "there is no question yet"
        if not text:
            raise ValueError
        del self.messages[-2:]
        self.ask(text)
        return ""

    def _do_clear(self, _: str) -> str:
        self.messages.clear()
        return "conversation cleared"

    def _do_system(self, text: str) -> str:
        if self.continues:
            return f"{self.name} continues text and knows no system prompt"
        self.system = text or None
        return f"system prompt: {text}" if text else "no system prompt"

    def _do_help(self, _: str) -> str:
        lines = [f"  {f'{name} {argument}':<18} {does}" for name, (argument, does) in COMMANDS.items()]
        return "\n".join([*lines, "  Ctrl-C ends an answer, Ctrl-D the conversation"])


class Shown:
    """Prints parts of an answer as they arrive; calls in a colour, as <<2*3=6>> or with an arrow after a program.

    Escapes control characters on a terminal; a file or a pipe gets the unchanged text.
    """

    _BEFORE: ClassVar[dict[tuple[Kind, Kind], str]] = {
        ("text", "python"): "<<", ("python", "python_output"): "=", ("text", "python_output"): "<<=",
        ("python", "text"): ">>", ("python_output", "text"): ">>", ("python_output", "python"): ">><<",
    }  # fmt: skip

    def __init__(self) -> None:
        self.kind: Kind = "text"
        self._call = ""
        self._styled = sys.stdout.isatty()
        if self._styled:
            from rich.console import Console

            self._console = Console(highlight=False, soft_wrap=True)

    def add(self, kind: Kind, text: str) -> None:
        """Print a piece of one kind."""
        for piece, call in self._pieces(kind, text):
            if self._styled:
                self._console.print(visible(piece), style="cyan" if call else None, markup=False, emoji=False, end="")
            else:
                sys.stdout.write(piece)
        sys.stdout.flush()

    def finish(self) -> None:
        """Close an open call and end the line."""
        self.add("text", "\n")

    def _pieces(self, kind: Kind, text: str) -> Iterator[tuple[str, bool]]:
        if kind != self.kind:
            mark = self._BEFORE[self.kind, kind]
            yield "\n→ " if mark == "=" and "\n" in self._call.strip() else mark, True
            self.kind, self._call = kind, ""
        self._call += text
        yield text, kind != "text"


Reader = Callable[[str], str]
"""Prompts for a line, starting with an editable text."""


def read_lines(mark: str, commands: Mapping[str, tuple[str, str]]) -> Iterator[tuple[str, Reader]]:
    """Yield non-empty lines, each with a function that prompts for an edited line, until the input ends."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                yield line.strip(), lambda default: default
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter

    shown: Any = {name: f"{name} {argument}" for name, (argument, _) in commands.items()}
    about: Any = {name: does for name, (_, does) in commands.items()}
    completer = WordCompleter(list(commands), display_dict=shown, meta_dict=about, sentence=True)
    session: PromptSession[str] = PromptSession(completer=completer)

    def ask(default: str = "") -> str:
        return str(session.prompt([("bold ansiblue", mark)], default=default)).strip()

    def change(default: str) -> str:
        try:
            return ask(default)
        except (KeyboardInterrupt, EOFError):  # changes nothing
            return ""

    while True:
        try:
            text = ask()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if text:
            yield text, change
