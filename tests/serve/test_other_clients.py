"""Third-party clients, if installed: litellm, langchain-openai, llm."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import BaseModel

QUESTION = [{"role": "user", "content": "the cat"}]


class Answer(BaseModel):
    yes: bool


@pytest.fixture(scope="module")
def url(start: Callable[..., Any]) -> Iterator[str]:
    with start() as running:
        yield f"{running.url}/v1"


@pytest.fixture
def said(server: Any) -> str:
    return server.chat(temperature=0, max_tokens=8).json()["choices"][0]["message"]["content"]


@pytest.mark.filterwarnings("default")  # litellm's own types warn
def test_litellm(url, said, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    asked: dict[str, Any] = {
        "model": "openai/sft", "api_base": url, "api_key": "none", "messages": QUESTION, "temperature": 0,
        "max_tokens": 8,
    }  # fmt: skip
    assert litellm.completion(**asked).choices[0].message.content == said
    chunks = litellm.completion(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said
    told = litellm.completion(**{**asked, "max_tokens": 40}, response_format=Answer)
    Answer.model_validate_json(told.choices[0].message.content)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**{**asked, "messages": [{"role": "user", "content": "a " * 300}]})


def test_langchain(url, said):
    langchain = pytest.importorskip("langchain_openai")
    options: dict[str, Any] = {"base_url": url, "api_key": "none", "temperature": 0, "max_tokens": 8}
    chat = langchain.ChatOpenAI(model="sft", **options)
    assert chat.invoke("the cat").content == said
    assert "".join(chunk.content for chunk in chat.stream("the cat")) == said
    assert [answer.content for answer in chat.batch(["the cat", "the cat"])] == [said, said]
    longer = langchain.ChatOpenAI(model="sft", **{**options, "max_tokens": 40})
    assert isinstance(longer.with_structured_output(Answer, method="json_schema").invoke("the cat"), Answer)
    text = langchain.OpenAI(model="pretrain", **options).invoke("the cat")
    assert isinstance(text, str)
    with pytest.raises(Exception, match="tools are not supported"):
        chat.bind_tools([Answer]).invoke("the cat")


def test_llm(url, said, tmp_path):
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: ours\n  model_name: sft\n  api_base: {url}\n  supports_schema: true\n"
    )
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}

    def ask(*options: str) -> str:
        command = [sys.executable, "-m", "llm", "-m", "ours", *options, "the cat"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.rstrip("\n")

    assert ask("-o", "temperature", "0", "-o", "max_tokens", "8") == said.rstrip("\n")
    schema = json.dumps(Answer.model_json_schema() | {"additionalProperties": False})
    Answer.model_validate_json(ask("--schema", schema, "-o", "max_tokens", "40"))
