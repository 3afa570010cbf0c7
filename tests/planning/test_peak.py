"""Peaks of devices: those that were published, by the names that devices give themselves, and the one measured here."""

from __future__ import annotations

import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.planning import peak
from mlxchat.planning.peak import keep_peak, measure_flops, peak_flops, raise_peak, tabled_peak_flops


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7),
        ("NVIDIA H100 PCIe", 756, 378),
        ("NVIDIA H200", 989.4, 494.7),
        ("NVIDIA A100-SXM4-80GB", 312, 156),
        ("NVIDIA L4", 121, 60),
        ("NVIDIA L40S", 362, 183),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA GeForce RTX 5090", 209.5, 104.8),
        ("Apple M1", 2.6, 2.6),
        ("Apple M1 Max", 10.4, 10.4),
        ("Apple M2", 3.6, 3.6),
        ("Apple M2 Max", 13.6, 13.6),
        ("Apple M4 Max", None, None),
        ("NVIDIA RTX A1000", None, None),
        ("", None, None),
    ],
)
def test_a_device_is_known_by_its_name_or_not_at_all(name: str, bfloat16: float | None, float32: float | None) -> None:
    for dtype, teraflops in ((mx.bfloat16, bfloat16), (mx.float32, float32), (mx.float16, None)):
        assert tabled_peak_flops(name, dtype) == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_the_measured_rate_is_that_of_large_products() -> None:
    """Against the best of a few products by NumPy's BLAS: they differ by threads, hardly by more."""
    one, other = np.ones((2048, 1024), np.float32), np.ones((1024, 4096), np.float32)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        one @ other
        seconds.append(time.perf_counter() - began)
    assert measure_flops(mx.float32) == pytest.approx(2 * 2048 * 1024 * 4096 / min(seconds), rel=0.9)


def test_the_peak_is_measured_once_per_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path))
    first = peak_flops(mx.float32)
    monkeypatch.setattr(peak, "_rate", lambda *_: 1 / 0)
    assert peak_flops(mx.float32) == first


def test_the_best_rate_ever_seen_on_a_machine_is_its_peak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A peak measured beside other work was too low, and a training reached 101 % of it.
    monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path))
    assert [keep_peak(mx.float32, rate) for rate in (5e10, 1e10, 7e10)] == [5e10, 5e10, 7e10]
    rates = iter([6e10, 8e10, 5e10] * 2)
    monkeypatch.setattr(peak, "_rate", lambda *_: next(rates))
    assert raise_peak(mx.float32, 7.5e10) == 8e10, "the best of three rounds"
    assert raise_peak(mx.float32, 9e10) == 9e10, "the training's own rate"
    monkeypatch.setattr(peak.platform, "node", lambda: "another machine")
    assert keep_peak(mx.float32, 1e10) == 1e10
    monkeypatch.undo()
    monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path))
    assert keep_peak(mx.float32, 1e10) == 9e10, "each machine's own is kept"
    (tmp_path / "peaks.json").write_text("[damaged")
    assert keep_peak(mx.float32, 2e10) == 2e10


def test_a_gpu_without_published_figure_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path))
    monkeypatch.setattr(peak, "default_dtype", lambda: mx.bfloat16)
    monkeypatch.setattr(peak, "measure_flops", lambda dtype: 1.5e13)
    monkeypatch.setattr(peak, "_device_name", lambda: "Apple M4 Max")
    peak._measured.cache_clear()
    assert peak_flops(mx.bfloat16) == 1.5e13
    peak._measured.cache_clear()
    monkeypatch.setattr(peak, "_device_name", lambda: "Apple M1")
    assert peak_flops(mx.bfloat16) == 2.6e12


def test_on_a_cpu_only_float32_has_a_peak() -> None:
    assert peak_flops(mx.bfloat16) is None
