"""Sample texts of a model."""

from __future__ import annotations

from typing import Any

from mlxchat.data.vocabulary import SPECIAL_TOKENS
from mlxchat.engine.generate import Engine


def continue_prompts(engine: Engine, prompts: list[str], max_new_tokens: int, **how: Any) -> list[tuple[str, str]]:
    """Return each prompt with the model's continuation; sampling parameters are those of `Engine.complete`."""
    ids = [[engine.tokenizer.bos, *engine.tokenizer.encode(prompt)] for prompt in prompts]
    completions = engine.complete(ids, max_new_tokens=max_new_tokens, **how)
    return list(zip(prompts, [readable(engine.tokenizer.decode(each.ids)) for each in completions], strict=True))


def answer_prompts(engine: Engine, prompts: list[str], max_new_tokens: int) -> list[tuple[str, str]]:
    """Return each prompt with the model's greedy answer as an assistant."""
    ids = [engine.render([{"role": "user", "content": prompt}]) for prompt in prompts]
    completions = engine.complete(ids, max_new_tokens=max_new_tokens)
    return list(zip(prompts, [readable(engine.tokenizer.decode(each.ids)) for each in completions], strict=True))


def readable(text: str) -> str:
    """Return generated text with calculator calls as <<call=result>> and without special tokens."""
    for token, shown in (("<|python_start|>", "<<"), ("<|python_end|><|output_start|>", "="), ("<|output_end|>", ">>")):
        text = text.replace(token, shown)
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "")
    return text
