"""The reference: pages generated from the code, and pages written by hand that must name every metric and file."""

import re

from kit.docs import DOCS, docs_module
from mlxchat.composition.compose import compose_config
from mlxchat.runner.stage import Stages
from mlxchat.store.fingerprint import flatten, plain_of


def written(page: str) -> str:
    return (DOCS / "reference" / f"{page}.md").read_text(encoding="utf-8")


def test_every_composed_key_has_a_row():
    pages = docs_module("reference").pages().items()
    anchors = re.findall(r'<code id="([^"]+)"', next(text for path, text in pages if path.endswith("config.md")))
    parents = {anchor.partition(".*.")[0] for anchor in anchors if ".*." in anchor}
    # Any word may follow a mapping whose entries have no rows of their own.
    ends = ["" if anchor in parents else r"(\..+)?" for anchor in anchors]
    forms = [re.escape(anchor).replace(r"\*", "[^.]+") + end for anchor, end in zip(anchors, ends, strict=True)]
    known = re.compile("|".join(forms))
    keys = flatten(plain_of(compose_config(["model=d20", "rl=dapo", "core=nanochat", "corpus=climbmix"]).config))
    assert len(keys) > 300
    assert [key for key in keys if not known.fullmatch(key)] == []


def test_pages_explain_every_metric_and_file():
    stages = Stages().values()
    metrics = {metric.name for stage in stages for metric in stage.metrics} - {"*"}
    files = {file for stage in stages for names in stage.outputs for file in names.split("|")}
    for page, names in (("metrics", metrics), ("artifacts", files)):
        assert sorted(name for name in names if f"`{name}`" not in written(page)) == []


def test_nanochat_page_names_keys_that_exist():
    forms = [re.escape(each.key).replace(r"\*", r"\w+") for each in docs_module("reference").settings()]
    sections = "|".join({form.partition(r"\.")[0] for form in forms if r"\." in form})
    text = written("nanochat").partition("\n## Files")[0].replace("{stage}", "sft")
    keys = re.findall(rf"`((?:{sections})\.[\w.]+)[=`]", text)
    assert len(keys) > 50
    assert [key for key in keys if not re.fullmatch("|".join(forms), key)] == []
