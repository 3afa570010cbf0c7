"""The written report: whole files, pictures, and hostile texts that stay text."""

import io
import itertools
import re
from html.parser import HTMLParser
from pathlib import PurePosixPath
from xml.etree import ElementTree

import pytest
from rich.console import Console

from mlxchat.errors import StoreError
from mlxchat.report import print_summary, write_report
from mlxchat.report.html import draw_graph
from mlxchat.report.layout import arrange
from mlxchat.report.markdown import escape, render_markdown
from mlxchat.report.plots import all_charts, bpb_baselines
from mlxchat.report.smoothing import smooth

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


def test_no_temporary_file_is_left(reported):
    assert not [path for path in reported.run.rglob("*") if "tmp" in path.suffix]


def test_address_of_the_page_is_returned(small):
    assert write_report(small.root, small.run) == small.run / "report.html"


def test_second_report_removes_pictures_that_no_longer_apply(small):
    (small.run / "report").mkdir()
    (small.run / "report" / "curve-gone.svg").write_bytes(b"")
    write_report(small.root, small.run)
    assert not (small.run / "report" / "curve-gone.svg").exists()


def test_folder_that_cannot_be_written_is_a_fault(small):
    (small.run / "report.html").mkdir()  # a folder where a file should be
    with pytest.raises(StoreError, match="cannot be written to"):
        write_report(small.root, small.run)


def test_page_holds_what_the_run_was(reported):
    words = Page(read_page(reported)).words
    for expected in ("speedrun", "12.6M", "44.6%", "Apple M3 Max", reported.artifact("rl"), "model=d4"):
        assert expected in words


def test_page_of_a_run_without_evals_or_training_has_neither_metrics_nor_curves(small):
    write_report(small.root, small.run)
    assert "<h2>Pipeline" in read_page(small)
    page = read_page(small)
    assert "<h2>Metrics" not in page
    assert 'class="chart"' not in page


def test_hostile_text_stays_text_in_html(hostile):
    write_report(hostile.root, hostile.run)
    page = Page(read_page(hostile))
    assert not page.tags & {"script", "red", "iframe", "object", "link"}
    assert '</pre><script>alert("x")</script> | [red]no[/red]' in page.words
    assert "{{ 7*7 }}" in page.words
    assert not re.search("[\x1b\u202e\ud800]", page.words)


def test_page_asks_for_nothing_from_outside(reported):
    source = read_page(reported)
    addresses = Page(source).addresses
    assert addresses
    assert all(address.startswith("#") for address in addresses)
    assert not re.search(r"@import|url\((?!#arrow)|https?:", source)


def test_hostile_sample_cannot_leave_its_markdown_fence(hostile):
    lines = render_markdown(hostile.read(), PurePosixPath("report")).split("\n")
    fences = [line for line in lines if line.startswith("```") and "mermaid" not in line]
    assert fences.count("````text") == fences.count("````") == 2
    assert fences.count("```text") == 3


def test_markdown_marks_in_names_lose_their_meaning():
    assert escape("a|b <i> *c* `d` $e$\nf arc_easy _g_") == (r"a\|b \<i\> \*c\* \`d\` \$e\$ f arc_easy \_g\_")


def test_summary_prints_hostile_text_as_it_is(hostile):
    console = Console(file=io.StringIO(), width=400, force_terminal=False)
    print_summary(hostile.read(), console)
    printed = console.file.getvalue()
    assert "[red]no[/red]" in printed
    assert "\x1b" not in printed


def test_summary_has_the_metric_table_and_the_states(whole):
    console = Console(file=io.StringIO(), width=110)
    print_summary(whole.read(), console)
    printed = console.file.getvalue()
    assert re.search(r"Metric +BASE +MID +SFT +RL", printed)
    assert "10 steps: 2 cached, 8 run" in printed


def test_bpb_baselines_are_drawn_only_for_the_text_they_were_measured_on(whole):
    report = whole.read()
    expected = {"order-2 n-gram": 2.3051, "untrained model": 3.2466}
    assert bpb_baselines(report, report.step("pretrain")) == expected
    assert bpb_baselines(report, report.step("midtrain")) == {}


def test_pictures_say_in_words_where_curves_end(make):
    evals = ["eval_base", "eval_mid", "eval_sft", "eval_rl"]
    fake = make(without=["pretrain", "midtrain", "rl", *evals], sft={"stage": "sft"})
    fake.write_lines(fake.folder("sft") / "metrics.jsonl", [{"iteration": 3, "loss": 1.25}])
    (chart,) = all_charts(fake.read())
    assert chart.alt == "Curve of the training loss of step sft over its iterations, nats per token: it ends at 1.250."


def test_many_tasks_and_one_eval_still_make_a_chart(make):
    fake = make(without=["midtrain", "sft", "rl", "eval_mid", "eval_sft", "eval_rl"])
    tasks = {f"task {i}": {"accuracy": i / 30, "chance": None if i % 2 else 0.25} for i in range(25)}
    fake.edit_json("eval_base", "scores.json", tasks=tasks)
    assert "accuracy" in [chart.name for chart in all_charts(fake.read())]


@pytest.mark.parametrize("window", [1, 5, 99])
def test_smoothing_keeps_a_straight_line(window):
    line = [3.0 - 0.5 * i for i in range(12)]
    assert smooth(line, window) == pytest.approx(line)


def test_smoothing_takes_the_mean_away_from_the_ends():
    assert smooth([0.0, 0.0, 9.0, 0.0, 0.0], window=3)[1:4] == pytest.approx([3.0, 3.0, 3.0])


def test_wide_graph_runs_from_left_to_right(whole):
    boxes = {box.name: box for box, *_ in draw_graph(whole.read(), is_wide=True).boxes}
    chain = ["corpus", "tokenizer", "pretrain", "midtrain", "sft", "rl", "eval_rl"]
    for left, right in itertools.pairwise(chain):
        assert boxes[left].x + boxes[left].width < boxes[right].x


def test_chain_of_training_steps_is_drawn_straight(whole):
    boxes = {box.name: box for box, *_ in draw_graph(whole.read(), is_wide=True).boxes}
    heights = [boxes[step].y for step in ("tokenizer", "pretrain", "midtrain", "sft", "rl")]
    assert max(heights) - min(heights) < 3


@pytest.mark.parametrize("is_wide", [True, False])
def test_boxes_never_overlap_and_lie_inside_the_drawing(is_wide):
    names = [f"s{i}" for i in range(12)]
    inputs = {name: names[max(0, i - 5) : i : 2] for i, name in enumerate(names)}
    layout = arrange(dict.fromkeys(names, 90.0), inputs, height=40.0, is_wide=is_wide)
    for a, b in itertools.combinations(layout.boxes, 2):
        assert abs(a.x - b.x) >= 90.0 - 1e-6 or abs(a.y - b.y) >= 40.0 - 1e-6, (a, b)
    for box in layout.boxes:
        assert 0 <= box.x <= layout.width - box.width
        assert 0 <= box.y <= layout.height - box.height


def test_every_input_has_one_arrow_into_its_box():
    layout = arrange({"a": 9, "b": 9, "c": 9}, {"b": ["a"], "c": ["a", "b", "gone"]}, height=9, is_wide=True)
    assert sum(line.has_arrow for line in layout.lines) == 3
