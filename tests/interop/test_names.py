"""Names and shapes agree with the model."""

from __future__ import annotations

import pytest

from mlxchat.errors import DataError
from mlxchat.interop import names
from mlxchat.model.gpt import GPT, flatten_parameters
from mlxchat.model.sizes import GPTSizes

META = {"sequence_len": 256, "vocab_size": 1000, "n_layer": 3, "n_head": 2, "n_kv_head": 1, "n_embd": 64}
LATER = ["value_embeds.0.weight", "resid_lambdas", "x0_lambdas", "smear_gate.weight", "smear_lambda", "backout_lambda"]


def sizes_of(later: bool) -> GPTSizes:
    return names.sizes_from_nanochat({**META, **({"window_pattern": "SSSL"} if later else {})}, LATER * later, "x")


@pytest.mark.parametrize("later", [False, True])
def test_expected_shapes_are_the_models(later: bool) -> None:
    made = {name: tuple(value.shape) for name, value in flatten_parameters(GPT(sizes_of(later))).items()}
    assert names.expected_shapes(sizes_of(later)) == made


def test_hugging_face_has_no_names_of_july_2026() -> None:
    with pytest.raises(DataError, match="resid_lambdas"):
        names.hf_from_ours("resid_lambdas")


def test_versions_between_the_two_are_refused() -> None:
    with pytest.raises(DataError, match="between October 2025 and July 2026"):
        names.sizes_from_nanochat(META, ["resid_lambdas", "x0_lambdas"], "model_000001.pt")


def test_all_wrong_sizes_are_named() -> None:
    with pytest.raises(DataError, match=r"n_layer is None, n_head is 0"):
        names.sizes_from_nanochat({**META, "n_layer": None, "n_head": 0}, [], "meta")
