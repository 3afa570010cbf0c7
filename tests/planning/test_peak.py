"""Peaks of devices: those that were published, by the names that devices give themselves, and the one measured here."""

from __future__ import annotations

import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.planning import peak
from mlxchat.planning.peak import measure_peak_flops, measured_peak_flops, peak_flops, tabled_peak_flops


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7),
        ("NVIDIA H100 PCIe", 756, 378),
        ("NVIDIA H200", 989.4, 494.7),
        ("NVIDIA A100-SXM4-80GB", 312, 156),
        ("NVIDIA L4", 121, None),
        ("NVIDIA L40S", 362, None),
        ("NVIDIA GeForce RTX 4090", 165.2, None),
        ("NVIDIA GeForce RTX 5090", 209.5, None),
        ("Apple M1", None, 2.6),
        ("Apple M1 Max", None, 10.4),
        ("Apple M2", None, 3.6),
        ("Apple M2 Max", None, None),  # Apple published none
        ("Apple M4", None, None),
        ("NVIDIA RTX A1000", None, None),
        ("", None, None),
    ],
)
def test_a_device_is_known_by_its_name_or_not_at_all(name: str, bfloat16: float | None, float32: float | None) -> None:
    for dtype, teraflops in ((mx.bfloat16, bfloat16), (mx.float32, float32), (mx.float16, None)):
        assert tabled_peak_flops(name, dtype) == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_the_measured_peak_is_that_of_large_products() -> None:
    """Against the best of a few products of the same shape by NumPy's BLAS: they differ by threads, hardly by more."""
    one, other = np.ones((2048, 1024), np.float32), np.ones((1024, 4096), np.float32)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        one @ other
        seconds.append(time.perf_counter() - began)
    assert measured_peak_flops() == pytest.approx(2 * 2048 * 1024 * 4096 / min(seconds), rel=0.9)


def test_it_is_measured_once_per_process() -> None:
    first, began = measured_peak_flops(), time.perf_counter()
    assert measured_peak_flops() == first
    assert time.perf_counter() - began < 0.05


def test_the_best_measurement_of_a_machine_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A peak measured beside other work was too low, and a training reached 101 % of it.
    monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path))

    def measured(rate: float) -> float:
        monkeypatch.setattr(peak, "_rate", lambda *_: rate)
        return measure_peak_flops()

    assert [measured(rate) for rate in (5e10, 1e10, 7e10)] == [5e10, 5e10, 7e10]
    monkeypatch.setattr(peak.platform, "node", lambda: "another machine")
    assert measured(1e10) == 1e10
    (tmp_path / "peaks.json").write_text("[damaged")
    assert measured(2e10) == 2e10


def test_on_a_cpu_only_float32_has_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "backend", lambda: "cpu")
    assert peak_flops(mx.float32) == measured_peak_flops()
    assert peak_flops(mx.bfloat16) is None
