"""Sample texts of a model."""

from __future__ import annotations

from mlxchat.data.conversation import render_for_completion
from mlxchat.data.vocabulary import SPECIAL_TOKENS
from mlxchat.engine.generate import Engine


def continue_prompts(
    engine: Engine,
    prompts: list[str],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> list[tuple[str, str]]:
    """Return each prompt with the model's continuation; sampling parameters are those of `Engine.complete`."""
    tokenizer = engine.tokenizer
    ids = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in prompts]
    if not ids:
        return []
    completions = engine.complete(ids, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed)
    return [
        (prompt, readable(tokenizer.decode(completion.ids)))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def answer_prompts(engine: Engine, prompts: list[str], max_new_tokens: int) -> list[tuple[str, str]]:
    """Return each prompt with the model's greedy answer as an assistant."""
    tokenizer = engine.tokenizer
    rendered = [
        render_for_completion(tokenizer, {"messages": [{"role": "user", "content": prompt}]}) for prompt in prompts
    ]
    completions = engine.complete(rendered, max_new_tokens=max_new_tokens) if rendered else []
    texts = [readable(tokenizer.decode(completion.ids)) for completion in completions]
    return list(zip(prompts, texts, strict=True))


def readable(text: str) -> str:
    """Return generated text with calculator calls as <<call=result>> and without special tokens."""
    for token, shown in (("<|python_start|>", "<<"), ("<|python_end|><|output_start|>", "="), ("<|output_end|>", ">>")):
        text = text.replace(token, shown)
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "")
    return text
