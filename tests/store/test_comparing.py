"""`diff` names different devices and MLX versions of artifacts, `plan` those that differ from this machine's."""

from typing import Any

from mlxchat.store.compare import differences, environment_drift
from mlxchat.store.environment import versions


def made_with(backend: str, mlx: str | None) -> dict[str, Any]:
    return {"device": {"backend": backend}, "versions": {"mlx": mlx, "python": "3.12"}}


def test_diff_shows_device_and_mlx():
    changes = differences(made_with("metal", "0.31.0"), made_with("cuda", "0.32.0"))
    assert {section: found for section, found in changes.items() if found} == {
        "environment": {"mlx": ("0.31.0", "0.32.0"), "device.backend": ("metal", "cuda")}
    }


def test_diff_names_both_seeds_by_their_keys():
    old, new = ({"config": {"seed": data_seed}, "seed": 1, "data_seed": data_seed} for data_seed in (1, 2))
    assert differences(old, new)["config"] == {"data_seed": (1, 2)}


def test_drift_is_another_device_or_mlx_than_here():
    here = versions()["mlx"]
    assert environment_drift(made_with("cpu", here), "cpu") == {}
    assert environment_drift(made_with("metal", "0.1"), "cpu") == {"device": ("metal", "cpu"), "mlx": ("0.1", here)}
    assert environment_drift({}, "cpu") == {}, "older artifacts did not record it"
