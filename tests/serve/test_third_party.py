"""Third-party models are served like ours."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from kit.serving import BASE, CHAT, Server
from mlxchat.serve.api import Service
from mlxchat.serve.models import Models, load_scheduler
from mlxchat.serve.requests import Defaults
from mlxchat.serve.security import Limits
from mlxchat.serve.worker import Worker
from mlxchat.store.store import Store

pytest.importorskip("mlx_lm", reason="third-party models need mlx-lm")

NAME = "tiny-llama"
SIZES = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48,
         "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 256,
         "tie_word_embeddings": False, "time_step_limit": [0.0, float("inf")]}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' and message['content'] == '' %}"
    "{{ raise_exception('an empty answer') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_folder(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Write a random Llama whose tokens are the 256 bytes and two special ones."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from mlxchat.data.vocabulary import byte_letters

    folder.mkdir()
    backend = Tokenizer(models.BPE({letter: byte for byte, letter in byte_letters().items()}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    words = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=template)
    words.save_pretrained(folder)
    config = {**SIZES, "vocab_size": 258, "eos_token_id": 257}
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    weights = {name: 8 * mx.random.normal(value.shape) * 0.05 for name, value in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("hf") / NAME)


@pytest.fixture(scope="module")
def server(folder: Path, served: Path) -> Iterator[Server]:
    """A server with a third-party default model and the store's models."""
    limits = Limits()
    models = Models(Store(served), folder, third_party={NAME: folder})
    with Server(Service(models, Worker(limits, load_scheduler), Defaults())) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def greedy(folder: Path, prompt: list[int], most: int) -> list[int]:
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    model, _ = load(str(folder))
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=most)]


def test_third_party_chat_equals_mlx_lm(client, folder):
    prompt = "<|im_start|>system\nbe brief<|im_end|><|im_start|>user\nhello<|im_end|><|im_start|>assistant\n"
    specials = {"<|im_start|>": 256, "<|im_end|>": 257}
    ids: list[int] = []
    for part in prompt.replace("<|", "\0<|").replace("|>", "|>\0").split("\0"):
        ids += [specials[part]] if part in specials else list(part.encode())
    expected = greedy(folder, ids, 12)
    messages: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    whole = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=12)
    said = bytes(id_ for id_ in expected if id_ < 256).decode(errors="replace")
    assert (whole.choices[0].message.content, whole.model) == (said, NAME)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), len(expected))
    stream = client.chat.completions.create(
        model=NAME, messages=messages, temperature=0, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == said
    assert chunks[-1].usage == whole.usage


def test_third_party_answer_follows_a_json_schema(server):
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    told = server.chat("hello", response_format=form, max_tokens=60, temperature=1, seed=1).json()["choices"][0]
    assert json.loads(told["message"]["content"]).keys() == {"yes"}


def test_own_and_third_party_models_are_served_together(server, client):
    listed = [entry.id for entry in client.models.list()]
    assert (listed[0], set(listed)) == (NAME, {NAME, CHAT, BASE})
    one = server.client.get(f"/v1/models/{NAME}").json()
    assert (one["owned_by"], one["mlxchat"]["converses"]) == ("third-party", True)
    config = one["mlxchat"]["config"]
    assert (config["model_type"], config["time_step_limit"]) == ("llama", [0.0, "Infinity"])
    named = {server.chat(model=name).json()["model"] for name in (NAME, f"hf:{NAME}", "default", "sft")}
    assert named == {NAME, CHAT}
    assert server.chat().json()["system_fingerprint"] == one["mlxchat"]["fingerprint"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"logit_bias": {"258": 1}}, "logit_bias"),
        ({"messages": [{"role": "user", "content": "a" * 300}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""},
                       {"role": "user", "content": "a"}]}, "messages"),
    ],
    ids=["no such token", "beyond the context", "the template raises"],
)  # fmt: skip
def test_unsupported_third_party_requests_are_refused(server, body, param):
    response = server.chat(**body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_serve_accepts_model_folders(folder, tmp_path, monkeypatch, command):
    monkeypatch.setattr("mlxchat.serve.run.run_server", lambda *arguments, **options: print("served", options["name"]))
    code, said = command("serve", "--model", f"hf:{folder}", f"outputs={tmp_path}/none")
    assert (code or 0, f"served {NAME}" in said) == (0, True)
    code, said = command("serve", f"hf:{folder}", "--bits", "4", f"outputs={tmp_path}/none")
    assert (code, f"--bits requires a model of mlxchat; mlx-lm runs hf:{folder}" in said) == (2, True)
