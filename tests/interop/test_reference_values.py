"""Imported models against values that nanochat computed from the same files."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.config.schema import ImportConfig
from mlxchat.interop.importing import import_model
from mlxchat.model.checkpoint import load_checkpoint
from mlxchat.model.parameters import flatten_parameters

HUB = Path(__file__).resolve().parents[3] / "shared" / "hub"
EXPECTED = HUB / "expected_nanochat_import.json"
pytestmark = pytest.mark.skipif(not EXPECTED.exists(), reason="the reference values are not on this machine")


@pytest.fixture(scope="module", params=["sdobson/nanochat", "karpathy/nanochat-d32"])
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A published model, imported, with its expected values."""
    out, folder = tmp_path_factory.mktemp("model"), HUB / "root" / "models" / request.param
    config = ImportConfig(name="x", format="nanochat", repository=None, revision="main", folder=str(folder),
                          step=None, chat=None)  # fmt: skip
    import_model(config, out, lambda: None)
    return {"loaded": load_checkpoint(out), "expected": json.loads(EXPECTED.read_text())["models"][request.param]}


def test_tensors_are_nanochats(imported):
    model, _, facts = imported["loaded"]
    parameters = flatten_parameters(model)
    wanted = imported["expected"]["tensors"]
    assert parameters.keys() == wanted.keys()
    for name, expected in wanted.items():
        array = np.asarray(parameters[name])
        assert list(array.shape) == expected["shape"]
        assert array.ravel()[:3].tolist() == expected["first"]
        # A float64 sum of so many numbers depends on the order of adding by about 1e-10.
        assert abs(array.sum(dtype=np.float64) - expected["sum"]) < 1e-8
    stored = {name for name, expected in wanted.items() if expected["dtype"] == "bfloat16"}
    assert facts["imported"]["dtypes"] == dict.fromkeys(stored, "bfloat16")
    assert facts["imported"]["step"] == imported["expected"]["step"]


def test_token_ids_are_nanochats(imported):
    _, tokenizer, _ = imported["loaded"]
    expected = imported["expected"]
    assert len(expected["tokenizer"]) == 20
    for each in expected["tokenizer"]:
        assert tokenizer.encode(each["text"]) == each["ids"]
        assert tokenizer.decode(each["ids"]) == each["text"]
    assert tokenizer.special_ids == expected["special_tokens"]
    told = expected["token_bytes"]
    assert (len(tokenizer.token_bytes), int((tokenizer.token_bytes == 0).sum())) == (told["count"], told["zero"])


def test_greedy_text_is_nanochats(imported):
    model, tokenizer, _ = imported["loaded"]
    for prompt in imported["expected"]["prompts"]:
        # Each of nanochat's greedy tokens is the most likely one after those before it.
        ids = [*prompt["ids"], *prompt["greedy"]]
        likeliest = mx.argmax(model(mx.array([ids[:-1]]))[0], axis=-1).tolist()
        assert likeliest[len(prompt["ids"]) - 1 :] == prompt["greedy"]
        assert len(prompt["greedy"]) == 24
        assert tokenizer.decode(prompt["greedy"]) == prompt["greedy_text"]
