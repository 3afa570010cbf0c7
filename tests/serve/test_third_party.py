"""Third-party models are served like ours: our checkpoint, opened by mlx-lm, gives our answers."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.model.checkpoint import save_checkpoint
from mlxchat.model.gpt import GPT
from serve.servers import BASE, CHAT, Server, chunks

pytest.importorskip("mlx_lm", reason="third-party models need mlx-lm")

NAME = "other"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: GPT, tokenizer: Tokenizer) -> Path:
    place = tmp_path_factory.mktemp("hf") / NAME
    place.mkdir()
    save_checkpoint(place, model, tokenizer, {"format": "chat"})
    return place


@pytest.fixture(scope="module")
def server(folder: Path, start: Callable[..., Server]) -> Iterator[Server]:
    """A server with a third-party default model and the store's models."""
    with start(third_party={NAME: folder}) as running:
        yield running


def test_third_party_answers_equal_ours(server):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the dog sat"}]
    body: dict[str, Any] = {"messages": messages, "temperature": 0, "max_tokens": 12}
    ours, theirs = (server.chat(**body, model=name).json() for name in (CHAT, NAME))
    assert (theirs["model"], theirs["choices"], theirs["usage"]) == (NAME, ours["choices"], ours["usage"])
    streamed = chunks(server.chat(**body, model=NAME, stream=True))
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in streamed)
    assert said == theirs["choices"][0]["message"]["content"]


def test_third_party_answer_follows_a_json_schema(server):
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    told = server.chat("hello", response_format=form, max_tokens=60, temperature=1, seed=1).json()["choices"][0]
    assert json.loads(told["message"]["content"]).keys() == {"yes"}


def test_own_and_third_party_models_are_served_together(server):
    listed = [entry["id"] for entry in server.client.get("/v1/models").json()["data"]]
    assert (listed[0], set(listed)) == (NAME, {NAME, CHAT, BASE})
    one = server.client.get(f"/v1/models/{NAME}").json()
    assert (one["owned_by"], one["mlxchat"]["converses"]) == ("third-party", True)
    named = {server.chat(model=name).json()["model"] for name in (NAME, f"hf:{NAME}", "default", "sft")}
    assert named == {NAME, CHAT}
    assert server.chat().json()["system_fingerprint"] == one["mlxchat"]["fingerprint"]
    refused: Any = [({"logit_bias": {"99999": 1}}, "logit_bias"), ({"text": "a " * 300}, "messages")]
    for body, param in refused:
        response = server.chat(**body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_serve_accepts_model_folders(folder, tmp_path, monkeypatch, command):
    monkeypatch.setattr("mlxchat.serve.api.run_server", lambda *arguments, **options: print("served", options["name"]))
    code, said = command("serve", f"hf:{folder}", f"outputs={tmp_path}/none")
    assert (code or 0, f"served {NAME}" in said) == (0, True)
    code, said = command("serve", f"hf:{folder}", "--bits", "4", f"outputs={tmp_path}/none")
    assert (code, f"--bits requires a model of mlxchat; mlx-lm runs hf:{folder}" in said) == (2, True)
