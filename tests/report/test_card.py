"""What the Hugging Face Hub reads of a model card: the scores of the model, and of no other."""

import json

import pytest
from huggingface_hub import ModelCard

from mlxchat.report.card import render_card
from mlxchat.store.manifest import MANIFEST, write_manifest
from mlxchat.store.store import Store

KINDS = {"corpus": "corpus", "tokenizer": "tokenizer", "eval": "scores"}


@pytest.mark.parametrize(
    ("step", "chats", "expected"),
    [
        ("sft", True, {"arithmetic": 0.288, "capitals": 0.446, "spelling": 0.934, "trivia": 0.335}),
        ("pretrain", False, {"arithmetic": 0.004, "capitals": 0.262, "spelling": 0.0, "trivia": 0.241, "text": 1.1187}),
    ],
)
def test_the_hub_reads_a_models_own_scores(make, tmp_path, step, chats, expected):
    fake = make()
    for name, entry in fake.pipeline.items():
        inputs = {
            role: {"step": source, "artifact": fake.artifact(source), "rid": fake.rid(source), "tree": "0" * 64}
            for role, source in fake.inputs(name).items()
        }
        kind = KINDS.get(entry["stage"], "checkpoint")
        facts = {"rid": fake.rid(name), "kind": kind, "tree": "0" * 64, "published": "2026-11-21T10:20:00+00:00"}
        folder = fake.folder(name)
        write_manifest(folder, {**json.loads((folder / MANIFEST).read_text()), **facts, "inputs": inputs})
    card = render_card(
        Store(fake.root), fake.folder(step), target="mlx", how={"trust": ""}, notes=[], sha256="0" * 64, chats=chats
    )
    (tmp_path / "README.md").write_text(card)
    told = ModelCard.load(tmp_path / "README.md").data
    assert (told.model_name, told.language, told.library_name) == (fake.artifact(step), "en", "mlx")
    assert {result.dataset_type: result.metric_value for result in told.eval_results} == expected
    assert {result.metric_type for result in told.eval_results if result.dataset_type != "text"} == {"accuracy"}
