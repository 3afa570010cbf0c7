"""What training on pairs gains on held-out prompts, of which the right answers follow by a rule."""

import json
from itertools import product

import numpy as np
import pytest

from kit.artifacts import publish_base
from kit.commands import run_here
from mlxchat.store.naming import refs_of
from mlxchat.store.store import Store

SETTINGS = """
    stage=preference pipeline.preference.checkpoint=artifact:base machine=cpu machine.blas_threads=1
    preference.row_tokens=64 preference.pairs_per_iteration=16 preference.num_iterations=60
    preference.schedule.init_lr_frac=0.5 preference.eval_every=null
"""
ANIMALS = ("cat", "dog")


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_held_out_pairs_are_told_apart_by_the_rule_of_the_training_pairs(loss, tmp_path):
    """The chosen answer names the animal of the question, so that no preference of an answer in itself helps.

    Such a preference and a guess are right in half of the pairs. The model that training starts from is random.
    """
    outputs, rng = tmp_path / "outputs", np.random.default_rng(0)
    publish_base(outputs)
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for number, which in product(range(300), (0, 1)):
            name = "".join(rng.choice(list("abcdefgh"), 4))
            line = {"prompt": f"{number} {ANIMALS[which]} {name}", "chosen": f"the {ANIMALS[which]}"}
            file.write(json.dumps({**line, "rejected": f"the {ANIMALS[1 - which]}"}) + "\n")
    more = (f"preference={loss}", f"preference.data.path={tmp_path}/pairs.jsonl", f"outputs={outputs}")
    assert run_here(*SETTINGS.split(), *more) == 0
    place = refs_of(Store(outputs))["preference"]
    curve = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    first, last = (each["val_pair_accuracy"] for each in curve if "val_pair_accuracy" in each)
    assert 0.4 <= first <= 0.6
    assert last > 0.9
