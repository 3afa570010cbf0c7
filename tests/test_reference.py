"""The reference: pages generated from the code, and pages written by hand that must name every metric and file."""

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.runner.stage import Stages
from mlxchat.store.fingerprint import flatten, plain_of

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def reference() -> Iterator[ModuleType]:
    """Load docs/reference.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec
    assert spec.loader
    module = sys.modules["reference"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["reference"]


@pytest.fixture(scope="module")
def pages(reference: ModuleType) -> dict[str, str]:
    return {Path(path).stem: text for path, text in reference.pages().items()}


def test_every_composed_key_has_a_row(pages):
    anchors = re.findall(r'<code id="([^"]+)"', pages["config"])
    parents = {anchor.partition(".*.")[0] for anchor in anchors if ".*." in anchor}
    # Any word may follow a mapping whose entries have no rows of their own.
    ends = ["" if anchor in parents else r"(\..+)?" for anchor in anchors]
    forms = [re.escape(anchor).replace(r"\*", "[^.]+") + end for anchor, end in zip(anchors, ends, strict=True)]
    known = re.compile("|".join(forms))
    keys = flatten(plain_of(compose_config(["model=d20", "rl=dapo", "core=nanochat", "corpus=climbmix"]).config))
    assert len(keys) > 300
    assert [key for key in keys if not known.fullmatch(key)] == []


def test_metrics_page_explains_every_metric():
    text = (DOCS / "reference" / "metrics.md").read_text(encoding="utf-8")
    metrics = {metric.name for stage in Stages().values() for metric in stage.metrics} - {"*"}
    assert sorted(metric for metric in metrics if f"`{metric}`" not in text) == []


def test_artifacts_page_explains_every_file():
    text = (DOCS / "reference" / "artifacts.md").read_text(encoding="utf-8")
    files = {file for stage in Stages().values() for names in stage.outputs for file in names.split("|")}
    assert sorted(file for file in files if f"`{file}`" not in text) == []


def test_nanochat_page_names_keys_that_exist(reference):
    text = (DOCS / "reference" / "nanochat.md").read_text(encoding="utf-8").partition("\n## Files")[0]
    forms = [re.escape(each.key).replace(r"\*", r"\w+") for each in reference.settings()]
    sections = "|".join({form.partition(r"\.")[0] for form in forms if r"\." in form})
    keys = re.findall(rf"`((?:{sections})\.[\w.]+)[=`]", text.replace("{stage}", "sft"))
    assert len(keys) > 50
    assert [key for key in keys if not re.fullmatch("|".join(forms), key)] == []
