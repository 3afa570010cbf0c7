"""What changes an artifact's id, and what does not."""

import base64
import hashlib
import importlib.metadata
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import Config, MomentumConfig
from mlxchat.data.tokens import Mixture
from mlxchat.hub import client
from mlxchat.runner.plan import make_plan
from mlxchat.store.fingerprint import canonical_json, compute_key, identity_of, plain_of
from mlxchat.store.store import Store

# The fields that no artifact's id knows. A new one belongs here only if it can change no byte of a result.
NOT_IDENTITY = {
    "model.name",
    *(
        f"{stage}.{name}"
        for stage in ("pretrain", "midtrain", "sft", "rl", "preference")
        for name in ("extend", "save_training_state", "eval_every", "save_every")  # the id of `extend` is an input
    ),
    *(
        f"pretrain.{name}"  # CORE is only looked at there
        for name in ("core.bundle", "core.sha256", "core.max_per_task", "core.tasks", "core.long_prompts", "core_every",
                     "sample_every", "sample_tokens", "prompts")
    ),
    *(
        f"{stage}.{name}"  # what is in a teacher's folder counts, or its id as an input
        for stage in ("midtrain", "sft")
        for name in ("teacher.path", "teacher.artifact", "suite", "suite_every")
    ),
    "eval.batch_rows", "eval.prompts",
    "outside.path",  # what is in the folder counts instead
    *(f"imported.{name}" for name in ("name", "repository", "revision", "folder", "step")),  # its files count
    "training.on_nan",
}  # fmt: skip
# What is in the files counts instead, wherever they are: test_externals.py.
PINNED = {"paths", "path", "text", "source", "revision", "bundle", "sha256"}
# Settings that only some evaluations read: those of base models, of chat models, or with a corpus.
OF_CHAT, OF_BASE = {"eval_mid", "eval_sft", "eval_rl"}, {"eval_base"}
READ_BY_SOME = {
    **dict.fromkeys(("suite", "eval.max_new_tokens", "eval.seeds", "eval.temperature", "eval.top_k"), OF_CHAT),
    **dict.fromkeys(("eval.core", "eval.base_tasks", "eval.bpb_tokens"), OF_BASE),
}
# Sections that no stage may declare, and those that are declared, with the steps that read them.
NEVER = (
    "stages",  # where they are found; what a stage is, its own key says
    "adapter",  # what each stage takes of it is its own
    "machine", "executor", "tracker", "bench", "name", "outputs", "targets", "force", "fail_fast",
    "report", "sweep",
)  # fmt: skip
TRAININGS = {"pretrain", "midtrain", "sft", "rl", "preference"}
EVALUATIONS = {"eval_base", "eval_mid", "eval_sft", "eval_rl"}
READ_BY: dict[str, set[str]] = {
    **{stage: {stage} for stage in ("corpus", "tokenizer", *sorted(TRAININGS))},
    "model": {"pretrain"},
    "architecture": {"pretrain"},
    "optimizer": TRAININGS,
    "training": TRAININGS,
    "eval": EVALUATIONS,
    "suite": EVALUATIONS,
    "outside": set(),  # its pipeline has another model
    "imported": set(),  # its pipelines, too
    "seed": TRAININGS | EVALUATIONS,
    "data_seed": {"corpus", "tokenizer", "midtrain", "sft"},
}


@pytest.fixture
def _no_downloads_of_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and splits that no task has are flipped here; what tasks download is pinned in test_externals.py."""
    monkeypatch.setattr("mlxchat.tasks.contents_of", lambda item, hash_of: [])


@cache
def full_config() -> Config:
    """A configuration in which every optional section is there, so that every field of the schema occurs."""
    overrides = "corpus=fineweb_edu experiment=quickstart corpus.packages=[] optimizer=muon_jul2026"
    config = compose_config([*overrides.split(), "core=nanochat", "adapter=qlora"]).config
    config.sft.mixture["kinds_mc"].options = {"seed": 3.0}
    config.pipeline["preference"] = {"stage": "preference", "checkpoint": "sft"}
    for stage in (config.pretrain, config.midtrain, config.sft, config.rl, config.preference):
        stage.schedule.momentum = MomentumConfig(start=0.8, end=0.9, warmup_iterations=3, final=0.7)
    return config


def leaves(section: Any, path: str) -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted path, object that holds it, attribute or key) of every leaf below a dataclass or mapping."""
    if is_dataclass(section):
        items = [(name.name, getattr(section, name.name)) for name in fields(section)]
    else:
        items = list(section.items())
    for name, value in items:
        here = f"{path}.{name}" if path else name
        if is_dataclass(value) or (isinstance(value, dict) and value and path != "pipeline"):
            yield from leaves(value, here)
        else:
            yield here, section, name


HOLDERS = {
    path: (holder, name)
    for path, holder, name in leaves(full_config(), "")
    if not path.startswith(("pipeline", "stages"))
}
LEAVES = list(HOLDERS)


def other_value(value: Any, holder: Any, name: str) -> Any:
    """Return another value of the leaf's type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return [*value, "x"]
    if isinstance(value, dict):
        return {**value, "x": "json:loads" if name == "own" else 1.0}
    assert value is None
    kinds = str(get_type_hints(type(holder))[name])
    return 7 if "int" in kinds else 7.5 if "float" in kinds else ["x"] if "list" in kinds else "x"


@contextmanager
def changed(path: str) -> Iterator[Config]:
    """Give the full configuration another value at one leaf, for a while."""
    holder, name = HOLDERS[path]
    before = holder[name] if isinstance(holder, dict) else getattr(holder, name)
    put = holder.__setitem__ if isinstance(holder, dict) else partial(setattr, holder)
    after = other_value(before, holder, name)
    assert plain_of(after) != plain_of(before)
    put(name, after)
    try:
        yield full_config()
    finally:
        put(name, before)


def ids(config: Config) -> dict[str, str]:
    store = Store(Path("/nonexistent"))
    plan = make_plan(replace(config, targets=None, force=[]), store)
    return {step.name: step.key for step in plan}


@pytest.mark.usefixtures("_no_downloads_of_tasks")
def test_dtype_is_part_of_gpu_steps_keys_only():
    config, found = full_config(), {}
    for dtype in ("float32", "bfloat16"):
        plan = make_plan(config, Store(Path("/nonexistent")), compute_dtype=dtype)
        found[dtype] = {step.name: step for step in plan}
    changed = {name for name, step in found["bfloat16"].items() if step.key != found["float32"][name].key}
    computing = {name for name, step in found["bfloat16"].items() if step.stage.uses_gpu}
    assert changed == below(computing) > {"pretrain", "sft"}
    assert all(found["bfloat16"][name].identity["compute_dtype"] == "bfloat16" for name in computing)
    assert not any("compute_dtype" in step.identity for step in found["float32"].values())


@cache
def full_ids() -> dict[str, str]:
    return ids(full_config())


def below(steps: set[str]) -> set[str]:
    """Return the steps and everything that is made from them."""
    wiring = full_config().pipeline
    while True:
        more = {
            step
            for step, entry in wiring.items()
            for role, source in entry.items()
            if role != "stage" and source in steps
        }
        if more <= steps:
            return steps
        steps = steps | more


def test_leaves_cover_every_field_of_the_schema():
    def names(schema: type, prefix: str = "") -> Iterator[str]:
        for item in fields(schema):
            hint = get_type_hints(schema)[item.name]
            nested = [kind for kind in (hint, *getattr(hint, "__args__", ())) if is_dataclass(kind)]
            if nested and not str(hint).startswith("dict"):
                yield from names(nested[0], f"{prefix}{item.name}.")
            else:
                yield f"{prefix}{item.name}"

    found = {name for name in names(Config) if name not in ("pipeline", "stages")}
    assert {name for name in found if not any(leaf == name or leaf.startswith(f"{name}.") for leaf in LEAVES)} == set()
    assert {item.name for item in fields(Config)} == {*READ_BY, *NEVER, "pipeline"}


def readers_of(path: str) -> set[str]:
    """Return the steps whose ids depend on a field."""
    some = next((READ_BY_SOME[some] for some in READ_BY_SOME if f"{path}.".startswith(f"{some}.")), None)
    return below(set(some or READ_BY[path.split(".")[0]]))


@pytest.mark.usefixtures("_no_downloads_of_tasks")
@pytest.mark.parametrize("planned", [1, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("section", READ_BY)
def test_identity_field_changes_only_its_readers_ids(section, planned):
    """Of each group of fields with the same readers, so many are planned; all change the section's identity."""
    before, counts, wrong = full_ids(), Counter[str](), {}
    paths = [path for path in LEAVES if path.split(".")[0] == section and path not in NOT_IDENTITY]
    for path in paths:
        if PINNED & set(path.split(".")):
            continue
        identity = identity_of(getattr(full_config(), section))
        with changed(path) as config:
            assert identity_of(getattr(config, section)) != identity, path
            readers = readers_of(path)
            counts[str(readers)] += 1
            # Packages must exist for a plan, and are hashed besides.
            if path.endswith((".packages", "tokenizer.source")) or counts[str(readers)] > planned:
                continue
            after = ids(config)
        if {step for step in before if before[step] != after[step]} != readers:
            wrong[path] = after
    assert wrong == {}


@pytest.mark.usefixtures("_no_downloads_of_tasks")
def test_excluded_fields_change_no_id():
    with ExitStack() as stack:
        for path in [*sorted(NOT_IDENTITY), *(path for path in LEAVES if path.split(".")[0] in NEVER)]:
            if path.endswith(".extend") or ".teacher." in path:  # must exist for a plan
                section = getattr(full_config(), path.split(".")[0])
                part = section.teacher if ".teacher." in path else section
                before = identity_of(part)
                with changed(path):
                    assert identity_of(part) == before, path
            else:
                stack.enter_context(changed(path))
        assert ids(full_config()) == full_ids()


def test_key_order_changes_no_conversation_order():
    # The id sorts the keys, so what is made must not depend on their order either.
    items = {name: full_config().sft.mixture[name] for name in ("identity", "arithmetic", "kinds_mc")}
    backwards = dict(reversed(items.items()))
    assert canonical_json(identity_of(items)) == canonical_json(identity_of(backwards))
    assert list(Mixture(items, seed=1)) == list(Mixture(backwards, seed=1))


def test_later_fields_keep_old_ids_at_their_default():
    @dataclass
    class Before:
        rate: float = 1.0

    @dataclass
    class After:
        rate: float = 1.0
        window: int | None = field(default=None, metadata={"since_default": None})

    assert identity_of(After()) == identity_of(Before())
    assert identity_of(After(window=3)) == {"rate": 1.0, "window": 3}


GOLDEN: dict[str, Any] = {
    "stage": "sft", "version": 3, "config": {"b": [1, 2.5, None, True], "a": {"ü": "né"}},
    "inputs": {"checkpoint": "abc", "corpus": "def"}, "externals": {"package x": "1.0"},
}  # fmt: skip
# Written out by hand: sorted keys, no spaces, text as it is.
GOLDEN_TEXT = (
    '{"config":{"a":{"ü":"né"},"b":[1,2.5,null,true]},"externals":{"package x":"1.0"},'
    '"inputs":{"checkpoint":"abc","corpus":"def"},"schema":1,"stage":"sft","version":3}'
)
GOLDEN_RID = base64.b32encode(hashlib.sha256(GOLDEN_TEXT.encode()).digest()).decode().strip("=").lower()


def test_golden_id_is_stable():
    """Every supported Python runs this."""
    rid = compute_key(*(GOLDEN[part] for part in ("stage", "version", "config", "inputs", "externals")))
    assert rid == GOLDEN_RID == "toptyhoq2jrc" + GOLDEN_RID[12:]
    assert re.fullmatch("[a-z2-7]{52}", rid)


EXPERIMENT_IDS = Path(__file__).with_name("golden_ids.json")


def test_shipped_experiments_keep_their_golden_ids(monkeypatch):
    """If an id must change, raise the stage's VERSION and write the file anew; all users compute again."""
    # Packages are pinned by version, and what is elsewhere by commit or sha256, which change.
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(client, "find_commit", lambda *revision: "0" * 40)
    monkeypatch.setattr(client, "find_content", lambda *address: "0" * 64)
    golden = json.loads(EXPERIMENT_IDS.read_text())
    # tinystories_53m needs an extra, those with an import somebody's model: tests/interop has golden ids of imports.
    # nanochat's recipe is that of speedrun_d20, with bundled data that of the quickstart.
    needing = {"bench", "nanochat", "nanochat_bundled", "tinystories_53m"}
    needing |= {"grpo_nanochat_d20", "grpo_nanochat_d32", "grpo_nanochat_rehearsal"}
    shipped = {path.stem for path in (Path(__file__).parents[2] / "conf" / "experiment").glob("*.yaml")}
    assert shipped - needing == golden.keys()
    assert {name: ids(compose_config([f"experiment={name}"]).config) for name in golden} == golden


def test_numbers_have_their_fields_type():
    @dataclass
    class Rates:
        lr: float = 0.5
        steps: int = 1
        clip: float | None = None
        rates: list[float] = field(default_factory=list)
        options: dict[str, float] = field(default_factory=dict)

    whole = Rates(lr=1, clip=2, rates=[1, 2], options={"a": 3})
    assert canonical_json(identity_of(whole)) == canonical_json(
        identity_of(Rates(lr=1.0, clip=2.0, rates=[1.0, 2.0], options={"a": 3.0}))
    )
    assert canonical_json(identity_of(Rates(steps=1))) != canonical_json(identity_of(Rates(steps=True)))
    assert canonical_json(identity_of(Rates(lr=1))) != canonical_json(identity_of(Rates(lr=True)))
    assert identity_of(Rates(steps=1))["steps"] == 1
