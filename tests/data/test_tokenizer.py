"""The tokenizer: lossless, special tokens in text, chat template."""

import json
from pathlib import Path
from typing import ClassVar

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
