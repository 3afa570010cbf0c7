"""The tokenizer: lossless, special tokens in text, chat template."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlxchat.data.tokenizer import Tokenizer, render_conversation, render_for_completion


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(place)
    return place


@given(st.text())
@example("<|bos|><|user_start|>")
@example("\U0001f600\u0301 ZWJ \u200d")
def test_encoding_is_lossless(tokenizer, text):
    ids = tokenizer.encode(text)
    assert (tokenizer.decode_bytes(ids), tokenizer.decode(ids)) == (text.encode(), text)
    assert int(tokenizer.token_bytes[ids].sum()) == len(text.encode())


class Generation(Extension):
    """transformers' Jinja tag; its contents are rendered unchanged."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render_template(folder: Path, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation])
    return environment.from_string(config["chat_template"]).render(
        messages=messages, add_generation_prompt=add_generation_prompt
    )


USER, ASSISTANT = {"role": "user", "content": " Hi {{ 1 }}\n"}, {"role": "assistant", "content": "Yo  \n\n"}
SYSTEM = {"role": "system", "content": "Be brief. "}


@pytest.mark.parametrize(
    "messages",
    [[USER, ASSISTANT], [SYSTEM, USER, ASSISTANT], [SYSTEM, USER, ASSISTANT, USER, ASSISTANT], [USER], [SYSTEM, USER],
     [USER, ASSISTANT, USER]],
)  # fmt: skip
def test_chat_template_equals_our_rendering(tokenizer, folder, messages):
    ids, _ = render_conversation(tokenizer, {"messages": messages})
    assert render_template(folder, messages, add_generation_prompt=False) == tokenizer.decode(ids)
    if messages[-1] is USER:
        ids = render_for_completion(tokenizer, {"messages": messages})
        assert render_template(folder, messages, add_generation_prompt=True) == tokenizer.decode(ids)


# Rendering of conversations: exactly the assistant's own tokens are trained on


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def part(kind: str, text: str) -> dict[str, str]:
    return {"type": kind, "text": text}


def talk(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages)}


CALL = assistant([part("text", "It is "), part("python", "6*7"), part("python_output", "42"), part("text", "42.")])


def shown(tokenizer: Tokenizer, ids: list[int], mask: list[int]) -> str:
    """Return the text with trained parts in square brackets."""
    text, trained = "", 0
    for token, bit in zip(ids, mask, strict=True):
        text += {(0, 1): "[", (1, 0): "]"}.get((trained, bit), "") + tokenizer.decode([token])
        trained = bit
    return text + "]" * trained


def render(tokenizer: Tokenizer, conversation: dict[str, Any]) -> str:
    return shown(tokenizer, *render_conversation(tokenizer, conversation))


def test_rendered_text_and_mask_are_exact(tokenizer):
    assert render(tokenizer, talk(user("6*7?"), CALL, user("c"), assistant("d"))) == (
        "<|bos|><|user_start|>6*7?<|user_end|><|assistant_start|>[It is <|python_start|>6*7<|python_end|>]"
        "<|output_start|>42<|output_end|>[42.<|assistant_end|>]"
        "<|user_start|>c<|user_end|><|assistant_start|>[d<|assistant_end|>]"
    )


def test_a_long_completion_prompt_keeps_its_end(tokenizer):
    """nanochat cuts prompts at 2,048 tokens, so that the question's end is lost."""
    prompt = render_for_completion(tokenizer, talk(user("1 2 " * 2000 + "?"), assistant("b")))
    assert len(prompt) > 8000
    assert tokenizer.decode(prompt[-3:]) == "?<|user_end|><|assistant_start|>"


# What is trained on, for any conversation

PARTS = st.lists(st.builds(part, st.sampled_from(["text", "python", "python_output"]), st.text(max_size=6)), max_size=4)
ANSWERS = st.one_of(st.text(max_size=8), PARTS)
TURNS = st.lists(st.tuples(st.text(max_size=8), ANSWERS), min_size=1, max_size=3)


@given(turns=TURNS, system=st.none() | st.text(max_size=5))
def test_exactly_the_assistants_text_calls_and_ends_are_trained(tokenizer, turns, system):
    messages = [message for question, answer in turns for message in (user(question), assistant(answer))]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    ids, mask = render_conversation(tokenizer, talk(*messages))

    special, expected = tokenizer.special_ids, []
    for _, answer in turns:
        for each in [part("text", answer)] if isinstance(answer, str) else answer:
            tokens = tokenizer.encode(each["text"])
            if each["type"] == "text":
                expected += tokens
            elif each["type"] == "python":
                expected += [special["<|python_start|>"], *tokens, special["<|python_end|>"]]
        expected.append(special["<|assistant_end|>"])
    assert [token for token, bit in zip(ids, mask, strict=True) if bit] == expected
    assert set(mask) <= {0, 1}
    assert ids[0] == tokenizer.bos
