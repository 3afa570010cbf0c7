"""`diff` names different devices, MLX versions and seeds of artifacts."""

from typing import Any

from mlxchat.store.compare import differences


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
