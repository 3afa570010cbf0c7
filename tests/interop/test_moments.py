"""Import of nanochat's optimizer moments, saved by one or several ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from kit.training import make_optimizer
from mlxchat.errors import DataError
from mlxchat.interop.importing import import_model
from mlxchat.model.gpt import GPT
from mlxchat.training.state import load_moments

Twin, Lay = Any, Any
Numbers = dict[str, np.ndarray[Any, Any]]
TABLES = ("lm_head.weight", "transformer.wte.weight", "value_embeds.1.weight", "resid_lambdas", "x0_lambdas",
          "smear_gate.weight", "smear_lambda", "backout_lambda")  # fmt: skip
PARTS = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "attn.ve_gate", "mlp.c_fc", "mlp.c_proj")


@pytest.fixture
def model(twin: Callable[..., Twin], lay: Lay) -> Callable[..., tuple[Twin, Numbers]]:
    """Write a checkpoint of nanochat's with the optimizer of `ranks` ranks; return it and the moments by our name.

    The order of parameters, their groups and the shares of ranks are those of setup_optimizer, DistAdamW, DistMuon,
    Muon and MuonAdamW in nanochat (gpt.py, adamw.py, muon.py, optim.py).
    """

    def make(*, later: bool, ranks: int) -> tuple[Twin, Numbers]:
        made, rng = twin(later=later), np.random.default_rng(1)
        shapes = {name: each.shape for name, each in made.tensors.items()}
        tables = [name for name in TABLES if name in shapes]
        names = [name for h in range(2) for part in PARTS if (name := f"transformer.h.{h}.{part}.weight") in shapes]
        # 2025's Muon of one rank grouped by the number of numbers, all others by shape.
        alone = not later and ranks == 1
        alike: dict[str, Any] = {name: int(np.prod(shapes[name])) if alone else shapes[name] for name in names}
        groups = [[name for name in names if alike[name] == one] for one in sorted(set(alike.values()))]
        moments: Numbers = {}
        for name in tables:
            moments |= {f"{kind}.{name}": rng.random(shapes[name], np.float32) for kind in ("first", "second")}
        for name in names:
            rows, columns = shapes[name]
            moments[f"momentum.{name}"] = rng.random((rows, columns), np.float32)
            if later:
                moments[f"variance.{name}"] = rng.random((rows, 1) if rows >= columns else (1, columns), np.float32)
        for rank in range(ranks):
            adamw = {number: table_state(lay, moments, name, rank, ranks, later) for number, name in enumerate(tables)}
            if later:
                muon, start = {}, len(tables)
                kinds = [{"kind": "adamw", "params": [number], "betas": (0.8, 0.95)} for number in adamw]
                for group in groups:
                    size = -(-len(group) // ranks)
                    own = group[rank * size : (rank + 1) * size]
                    muon[start] = {}
                    for theirs, ours in (("momentum_buffer", "momentum"), ("second_momentum_buffer", "variance")):
                        padding = [np.zeros_like(moments[f"{ours}.{group[0]}"])] * (size - len(own))
                        stacked = np.stack([moments[f"{ours}.{name}"] for name in own] + padding)
                        muon[start][theirs] = lay.Tensor(stacked)
                    kinds.append({"kind": "muon", "params": list(range(start, start + len(group))), "lr": 0.02})
                    start += len(group)
                content: Any = {"state": adamw | muon, "param_groups": kinds}
            else:
                numbered, start = [], 0
                for group in groups:
                    numbered.append({"params": list(range(start, start + len(group)))})
                    start += len(group)
                flat = [(place, name) for group in groups for place, name in enumerate(group)]
                muon = {
                    number: {"momentum_buffer": lay.Tensor(moments[f"momentum.{name}"])}
                    for number, (place, name) in enumerate(flat) if place % ranks == rank
                }  # fmt: skip
                two = [{"params": [0]}, {"params": [1]}]
                content = [{"state": adamw, "param_groups": two}, {"state": muon, "param_groups": numbered}]
            name = "optim_000007.pt" if alone else f"optim_000007_rank{rank}.pt"
            lay.write_torch(made.folder / name, content)
        return made, moments

    return make


def table_state(lay: Lay, moments: Numbers, name: str, rank: int, ranks: int, later: bool) -> dict[str, Any]:
    """A table of 1024 numbers or more, or any in 2025, is divided by rows."""
    whole = moments[f"first.{name}"]
    rows = len(whole) // ranks if not later or whole.size >= 1024 else len(whole)
    part = slice(rank * rows, (rank + 1) * rows) if rows < len(whole) else slice(None)
    step = 7 if later else lay.Tensor(np.array(7.0, np.float32))
    return {"step": step, "exp_avg": lay.Tensor(moments[f"first.{name}"][part].copy()),
            "exp_avg_sq": lay.Tensor(moments[f"second.{name}"][part].copy())}  # fmt: skip


def importing(made: Twin, out: Path) -> Path:
    out.mkdir()
    import_model(made.config(optimizer=True), out, lambda: None)
    return out


@pytest.mark.parametrize(("later", "ranks"), [(True, 1), (True, 4), (False, 1), (False, 3)])
def test_moments_of_all_ranks_are_those_of_our_optimizer(model, tmp_path, later, ranks):
    made, moments = model(later=later, ranks=ranks)
    out = importing(made, tmp_path / "out")
    found = load_file(out / "training_state.safetensors")
    assert found.pop("count") == 7
    optimizer = make_optimizer(GPT(made.sizes), "muon_jul2026" if later else "muon_oct2025")
    for stack, names in optimizer.stacks.items():
        for kind in ("momentum", "variance") if later else ("momentum",):
            moments[f"{kind}.{stack}"] = np.stack([moments.pop(f"{kind}.{name}") for name in names])
    assert found.keys() == moments.keys()
    for name, numbers in moments.items():
        np.testing.assert_array_equal(found[name], numbers, err_msg=name)
    load_moments(out, optimizer)
    assert optimizer.state["count"].item() == 7


@pytest.mark.parametrize(("later", "rank"), [(True, 3), (False, 2), (True, 1)])
def test_missing_rank_is_refused(model, tmp_path, later, rank):
    made, _ = model(later=later, ranks=4 if later else 3)
    (made.folder / f"optim_000007_rank{rank}.pt").unlink()
    expected = "lacks optim_000007_rank1.pt" if rank == 1 else "saved by .* ranks.*every rank.*without --optimizer"
    with pytest.raises(DataError, match=expected):
        importing(made, tmp_path / "out")


def test_missing_optimizer_is_refused(twin, tmp_path):
    with pytest.raises(DataError, match=r"no optim_000007_rank0\.pt.*without --optimizer"):
        importing(twin(), tmp_path / "out")


def test_unknown_optimizer_contents_are_refused(twin, lay, tmp_path):
    made = twin()
    for number, content in enumerate(({}, {"state": {}, "param_groups": []}, [1], {"state": 3, "param_groups": [{}]})):
        lay.write_torch(made.folder / "optim_000007_rank0.pt", content)
        with pytest.raises(DataError, match=r"rank0\.pt is not an optimizer state that nanochat .* for this model"):
            importing(made, tmp_path / f"out{number}")
