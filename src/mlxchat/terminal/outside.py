"""The terminal chat with a model of another make: its own template and tokens, its answers by mlx-lm."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxchat.errors import ConfigError
from mlxchat.evals.outside import OutsideModel, OutsideTokenizer, load_outside
from mlxchat.terminal.chat import Chat, Shown


@dataclass
class OutsideChat(Chat):
    """A model that mlx-lm opened, and the conversation so far."""

    opened: tuple[OutsideModel, OutsideTokenizer] | None = None

    @classmethod
    def open(cls, folder: Path, name: str, *, system: str | None, **settings: Any) -> OutsideChat:
        """Open a model; one whose tokenizer has no chat template continues text.

        Args:
            folder: what mlx-lm opens.
            name: what to call it.
            system: what stands before the conversation.
            settings: of `Chat`: temperature, top_k, top_p, max_tokens, seed.

        Raises:
            ConfigError: mlx-lm is not installed, or a setting is impossible.
            DataError: mlx-lm cannot open it.
        """
        if settings["temperature"] < 0 or settings["max_tokens"] < 1 or (settings["top_k"] or 1) < 1:
            raise ConfigError("--temperature must be at least 0, --max-tokens and --top-k at least 1")
        opened = load_outside(folder)
        continues = not opened[1].has_chat_template
        if continues and system:
            raise ConfigError(f"{name} has no chat template: it continues text and knows no system prompt")
        nothing: Any = None  # no engine of ours
        return cls(nothing, name, opened=opened, continues=continues, system=system, **settings)

    def ask(self, text: str) -> None:
        """Print what follows a text, or the answer to it, and remember question and answer."""
        if self.continues:
            prompt = self._beginning(text)
            self.last = text
            Shown().add("text", text)
            self._answer(prompt)
            return
        question = {"role": "user", "content": text}
        answer = self._answer(self._tokenizer.render_prompt(self._fitting(question)))
        self.messages += [question, {"role": "assistant", "content": answer}]

    @property
    def _opened(self) -> tuple[OutsideModel, OutsideTokenizer]:
        assert self.opened is not None
        return self.opened

    def _answer(self, prompt: list[int]) -> str:
        """Print what comes after a prompt, as it comes, and return it; Ctrl-C ends it there."""
        import mlx.core as mx
        from mlx_lm import stream_generate
        from mlx_lm.sample_utils import make_sampler

        model, tokenizer = self._opened
        self.seed += 1
        mx.random.seed(self.seed)

        def sampler(log_probabilities: mx.array) -> mx.array:
            # mlx-lm refuses a top_k that is not below the vocabulary, which leaves every token.
            top_k = self.top_k if self.top_k and self.top_k < log_probabilities.shape[-1] else 0
            drawn: mx.array = make_sampler(self.temperature, top_p=self.top_p or 0.0, top_k=top_k)(log_probabilities)
            return drawn

        said, shown = "", Shown()
        try:
            for piece in stream_generate(
                model.model, tokenizer.wrapper, prompt, max_tokens=self.max_tokens, sampler=sampler
            ):
                said += piece.text
                shown.add("text", piece.text)
        except KeyboardInterrupt:
            pass
        shown.finish()
        return said

    @property
    def _tokenizer(self) -> OutsideTokenizer:
        return self._opened[1]

    @property
    def _context_tokens(self) -> int:
        return self._opened[0].context_tokens

    def _num_tokens(self, messages: list[dict[str, Any]]) -> int:
        return len(self._opened[1].render_prompt(messages))
