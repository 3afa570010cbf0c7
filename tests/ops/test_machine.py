"""The compute dtype of devices."""

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from mlxchat.ops import machine


@pytest.fixture(autouse=True)
def uncached() -> Iterator[None]:
    machine.nvidia_has_bfloat16.cache_clear()
    yield
    machine.nvidia_has_bfloat16.cache_clear()


def driver(major: int, status: int = 0) -> Any:
    """libcuda of a GPU with this compute capability, whose calls return a status."""

    def attribute(value: Any, which: int, device: ctypes.c_int) -> int:
        value._obj.value = {75: major, 76: 0}[which]  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        return status

    return SimpleNamespace(
        cuInit=lambda flags: status, cuDeviceGet=lambda device, number: status, cuDeviceGetAttribute=attribute
    )


@pytest.mark.parametrize(
    ("major", "status", "dtype"), [(7, 0, "float32"), (8, 0, "bfloat16"), (9, 0, "bfloat16"), (7, 100, "bfloat16")]
)
def test_bfloat16_needs_compute_capability_8(major, status, dtype, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver(major, status))
    assert machine.fast_dtype("cuda") == dtype


def test_other_devices_need_no_nvidia_driver():
    assert [machine.fast_dtype(kind) for kind in ("cpu", "metal")] == ["float32", "bfloat16"]
    assert machine.dtype_name("cpu", "auto") == "float32"
    assert machine.dtype_name("cpu", "bfloat16") == "bfloat16", "the explicit setting wins"
