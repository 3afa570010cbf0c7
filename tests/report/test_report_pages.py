"""The written report: whole files, pictures, and hostile texts that stay text."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from mlxchat.report.summary import print_summary

HOSTILE = '</pre><script>alert("x")</script> | [red]no[/red] ``` \x1b[31m \u202eevil \ud800 *a* $x$ {{ 7*7 }}'


class Page(HTMLParser):
    """What a browser would make of a page: tags, addresses, and plain text."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.addresses, self.words = set(), [], ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.words += data


def read_page(fake):
    return (fake.run / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def small(make):
    return make(without=["pretrain", "midtrain", "sft", "rl", "eval_base", "eval_mid", "eval_sft", "eval_rl"])


@pytest.fixture
def hostile(whole):
    samples = [{"iteration": 1, "prompt": HOSTILE, "text": HOSTILE + "\n" + HOSTILE}]
    whole.write_lines(whole.folder("pretrain") / "samples.jsonl", samples)
    task = {"kind": "generative", "accuracy": 0.5, "chance": 0.1, "num_examples": 3, "stderr": 0.1}
    whole.edit_json("eval_sft", "scores.json", tasks={HOSTILE: task, "日本": task}, samples=samples)
    entry = {HOSTILE: HOSTILE}
    whole.edit_json("sft", "manifest.json", overrides=[HOSTILE], versions=entry, derived=entry)
    whole.append_event(event="run_failed", error=HOSTILE)
    return whole


def test_report_writes_page_markdown_and_pictures(reported):
    pictures = sorted(path.name for path in (reported.run / "report").iterdir())
    curves = {"midtrain": "val_bpb", "pretrain": "val_bpb", "rl": "pass", "sft": "val_loss"}
    expected = {"accuracy.svg", "rl-reward.svg", *(f"{step}-{curve}.svg" for step, curve in curves.items())}
    assert expected <= set(pictures)
    markdown = (reported.run / "report.md").read_text(encoding="utf-8")
    for name in pictures:
        ElementTree.fromstring((reported.run / "report" / name).read_text(encoding="utf-8"))
        assert f"(report/{name})" in markdown


def test_hostile_text_stays_text_in_html(hostile):
    hostile.write_report()
    page = Page(read_page(hostile))
    assert not page.tags & {"script", "red", "iframe", "object", "link"}
    assert '</pre><script>alert("x")</script> | [red]no[/red]' in page.words
    assert "{{ 7*7 }}" in page.words
    assert not re.search("[\x1b\u202e\ud800]", page.words)


def test_page_is_self_contained(reported):
    source = read_page(reported)
    assert all(address.startswith("#") for address in Page(source).addresses)
    assert not re.search(r"@import|url\((?!#)|https?:", source)


def test_summary_prints_hostile_text_as_it_is(hostile, capsys):
    print_summary(hostile.read())
    printed = capsys.readouterr().out
    assert "[red]no[/red]" in printed
    assert "\x1b" not in printed
