"""A sweep over sizes and budgets writes nanochat's table and the fitted laws."""

import csv
import re

import pytest

from mlxchat.planning.scaling import Training, fit_scaling_laws
from mlxchat.sweep.scaling import describe_laws, laws_of_report, write_scaling

SIZES = (10**5, 2 * 10**5, 4 * 10**5, 8 * 10**5)


@pytest.mark.slow
def test_sweep_over_sizes_and_budgets_fits_laws(mlxchat, tmp_path):
    settings = ["experiment=smoke", "stage=pretrain", "model.aspect_ratio=8,16,32", "model.head_width=16"]
    settings += ["pretrain.num_iterations=null", "pretrain.target_flops=1e10,3e10", "pretrain.eval_tokens=2048"]
    done = mlxchat("-m", *settings, f"outputs={tmp_path / 'outputs'}", timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "outputs" / "multirun").iterdir()
    rows = list(csv.DictReader((folder / "scaling.csv").read_text().splitlines()))
    assert [int(row["model_dim"]) for row in rows] == [16, 32, 64] * 2
    for row in rows:  # two layers, a vocabulary of 512, tied to nothing
        width = int(row["model_dim"])
        assert int(row["params_transformer"]) == 2 * 12 * width**2
        assert int(row["params_wte"]) == int(row["params_lm_head"]) == 512 * width
        assert int(row["tokens_trained"]) == 2048 * int(row["num_iterations"])
    assert (folder / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "scaling.md").read_text().startswith("# Scaling laws")
    assert f"scaling: {folder / 'scaling.csv'}" in done.stdout


def training(size: int, flops: float, bpb: float) -> Training:
    kinds = dict.fromkeys(("matrices", "embedding", "value_embeddings", "head", "scalars", "total"), size)
    return Training(
        name=f"{size}-{flops}", depth=1, width=1, parameters=kinds, horizon_parameters=size, num_iterations=1,
        tokens=int(flops / 6 / size), flops=flops, bpb=bpb,
    )  # fmt: skip


@pytest.mark.parametrize("middle", [2.5, 2.9])
def test_budgets_with_and_without_a_minimum_are_drawn(middle, tmp_path):
    found = [training(size, flops, bpb) for flops in (1e12, 1e13) for size, bpb in ((10, 3.0), (20, middle), (40, 2.8))]
    files = write_scaling(found, tmp_path)
    assert [file.name for file in files] == ["scaling.csv", "scaling.md", "scaling.png"]
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_budget_without_minimum_suggests_sizes():
    falling = [training(size, 1e12, bpb) for size, bpb in ((10**5, 3.0), (2 * 10**5, 2.9), (4 * 10**5, 2.8))]
    bowl = [training(size, 1e13, bpb) for size, bpb in ((10**5, 2.6), (2 * 10**5, 2.5), (4 * 10**5, 2.6))]
    laws = fit_scaling_laws(falling + bowl)
    assert laws is not None
    text = describe_laws(laws)
    assert "| 1e+12 | 3 | none among these sizes: try larger ones | | | 2.8000 |" in text
    assert "| 1e+13 | 3 | 200,000 | 8,333,333 | 41.7 | 2.5000 |" in text


def test_two_sizes_write_no_scaling_files(tmp_path):
    assert write_scaling([training(10, 1e9, 3.0), training(20, 1e9, 2.9)], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_report_has_the_laws_in_words_and_as_a_picture():
    bowl = [(size, flops, 2.5 + (size / best - 1) ** 2) for flops, best in ((1e12, 2e5), (1e13, 5e5)) for size in SIZES]
    words, pictures = laws_of_report([training(*one) for one in bowl])
    assert str(words).startswith("## Scaling laws")
    assert isinstance(pictures, list)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", pictures[0].svg)
    assert {"1e12 FLOPs", "1e13 FLOPs", "N, parameters", "C, FLOPs of pretraining"} <= set(texts)
    assert laws_of_report([training(*bowl[0])]) == laws_of_report([]) == []
