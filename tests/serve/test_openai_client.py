"""The official OpenAI client, used as documented."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import pydantic
import pytest

openai = pytest.importorskip("openai")
QUESTION = [{"role": "user", "content": "the cat"}]
KEY = "a-key-of-ours"


@pytest.fixture(scope="module")
def guarded(start: Callable[..., Any]) -> Iterator[Any]:
    with start(api_key=KEY, limits={"max_rows": 1, "max_queue": 0}) as running:
        yield running


@pytest.fixture
def client(guarded: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_openai_client_parses_pydantic_models(client):
    class Weather(pydantic.BaseModel):
        city: Literal["Rome", "Oslo"]
        sunny: bool

    told = client.chat.completions.parse(model="sft", messages=QUESTION, response_format=Weather, max_tokens=80)
    assert isinstance(told.choices[0].message.parsed, Weather)


def test_openai_client_streams(client):
    with client.chat.completions.stream(
        model="sft", messages=QUESTION, max_tokens=6, seed=2, logprobs=True, stream_options={"include_usage": True}
    ) as stream:
        assert len(list(stream)) > 1
        final = stream.current_completion_snapshot
    said = b"".join(bytes(entry.bytes) for entry in final.choices[0].logprobs.content)
    assert said.decode(errors="replace") == final.choices[0].message.content
    assert final.usage.total_tokens == final.usage.prompt_tokens + final.usage.completion_tokens


def test_openai_client_completes_and_lists_models(client):
    told = client.completions.create(model="pretrain", prompt="the dog", max_tokens=4, temperature=0)
    assert told.choices[0].text
    with pytest.raises(openai.BadRequestError, match="echo is not supported"):
        client.completions.create(model="pretrain", prompt="the dog", echo=True)
    models = [model.id for model in client.models.list()]
    assert client.models.retrieve(models[0]).id == models[0]


def test_errors_raise_the_clients_exceptions(client, guarded):
    with pytest.raises(openai.NotFoundError, match="gpt-4o"):
        client.chat.completions.create(model="gpt-4o", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="sft", messages=QUESTION, temperature=9)
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="sft", messages=QUESTION, n=2)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    with (
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
