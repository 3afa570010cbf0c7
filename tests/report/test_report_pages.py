"""The written report: whole files, hostile texts that stay text, pictures; which report `mlxchat report` writes."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from kit.pages import weakest_contrast
from mlxchat.cli import dispatch
from mlxchat.report.comparison import scaling_chart
from mlxchat.report.document import standalone
from mlxchat.report.plots import Curve, draw_bars, draw_curves, main_charts, more_charts, smooth
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


def test_page_is_self_contained_and_its_pictures_are_files(made):
    made.write_report()
    source = (made.run / "report.html").read_text(encoding="utf-8")
    assert all(address.startswith("#") for address in Page(source).addresses)
    assert not re.search(r"@import|url\((?!#)|https?:", source)
    pictures = {path.name for path in (made.run / "report").iterdir()}
    assert {"pretrain-loss.svg", "pretrain-val_bpb.svg", "sft-val_loss.svg", "rl-reward.svg"} <= pictures
    markdown = (made.run / "report.md").read_text(encoding="utf-8")
    for name in pictures:
        ElementTree.fromstring((made.run / "report" / name).read_text(encoding="utf-8"))
        assert f"(report/{name})" in markdown


def test_hostile_text_stays_text(made, capsys):
    samples = [{"iteration": 1, "prompt": HOSTILE, "text": HOSTILE + "\n" + HOSTILE}]
    made.write_lines("pretrain", "samples.jsonl", samples)
    task = {"kind": "generative", "accuracy": 0.5, "chance": 0.1, "num_examples": 3, "stderr": 0.1}
    made.edit("eval_sft", "scores.json", tasks={HOSTILE: task, "日本": task}, samples=samples)
    made.edit("sft", "manifest.json", versions={HOSTILE: HOSTILE}, derived={HOSTILE: HOSTILE})
    made.add_event(event="run_failed", error=HOSTILE)
    page = Page(made.write_report().read_text(encoding="utf-8"))
    assert not page.tags & {"script", "red", "iframe", "object", "link"}
    assert '</pre><script>alert("x")</script> | [red]no[/red]' in page.words
    assert "{{ 7*7 }}" in page.words
    assert not re.search("[\x1b\u202e\ud800]", page.words)
    print_summary(made.report())
    printed = capsys.readouterr().out
    assert "[red]no[/red]" in printed
    assert "\x1b" not in printed


def tell(made, *arguments):
    assert dispatch(["report", f"outputs={made.outputs}", *map(str, arguments)]) == 0


def test_latest_run_is_the_default(made, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    tell(made, "--open", "--cost-per-hour", "24")
    assert opened == [(made.run / "report.html").resolve().as_uri()]
    assert "$" in (made.run / "report.html").read_text()
    assert f"report: {made.run / 'report.html'}" in capsys.readouterr().out


def test_run_and_artifact_are_found_by_name_or_folder(made, tmp_path, capsys):
    for name in ("smoke", f"outputs/runs/{made.run.name}"):
        tell(made, name, "--out", tmp_path / "there")
        assert (tmp_path / "there" / "report" / "pretrain-loss.svg").is_file()
    capsys.readouterr()
    tell(made, made.folders["eval_sft"].name, "--out", tmp_path / "artifact")
    words = (tmp_path / "artifact" / "report.md").read_text()
    assert "<summary>midtrain (MID)" in words
    assert "<summary>rl (RL)" not in words, "only what it was made from"
    assert re.search(r"Metric +SFT", capsys.readouterr().out)


def test_sweep_is_reported(made):
    plan = json.loads((made.run / "plan.json").read_text())
    folder = made.outputs / "multirun" / "20261121-1"
    folder.mkdir(parents=True)
    jobs = {str(n): {"settings": {}, "title": f"model=d{2 * n}", "steps": plan["steps"]} for n in (1, 2)}
    (folder / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    tell(made, "20261121-1")
    assert "| model=d4 |" in (folder / "report.md").read_text(), "while it runs"
    table = [{"job": n, "model": f"d{2 * n}", "eval.val_bpb": 1.25, "status": "done"} for n in (2, 1)]
    (folder / "table.json").write_text(json.dumps(table))
    tell(made, "20261121-1")
    assert "| 2 | d4 | 1.25 | done" in (folder / "report.md").read_text()


TEXTS_OUTSIDE = """[...document.querySelectorAll('svg.chart text')].filter(e => {
    const own = e.getBoundingClientRect(), all = e.ownerSVGElement.getBoundingClientRect();
    return own.left < all.left - 2 || own.right > all.right + 2 || own.bottom > all.bottom + 2;
}).map(e => e.textContent)"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "scheme", "ground"),
    [(320, "dark", "rgb(13, 17, 23)"), (375, "light", "rgb(255, 255, 255)"), (1280, "dark", "rgb(13, 17, 23)")],
)
def test_page_fits_every_screen_readably(browser, made, width, scheme, ground):
    page, told = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), []
    page.on("request", lambda request: told.append(request.url))
    page.on("console", lambda message: told.append(message.text))
    page.goto(made.write_report().as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert told == [(made.run / "report.html").as_uri()], "no other request, no message"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
    assert page.locator("svg.chart").count() > 5
    assert weakest_contrast(page)[0] >= 4.5, weakest_contrast(page)
    assert page.evaluate(TEXTS_OUTSIDE) == []
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.close()


SVG = "{http://www.w3.org/2000/svg}"


def chart(points, **options):
    curves = [Curve(points=points, label="end", errors=options.pop("errors", []))]
    return draw_curves(**{"name": "c", "title": "t", "alt": "a", "y": "y", "curves": curves, **options})


def words(svg):
    return ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_hostile_names_stay_text_in_pictures():
    name = '"><script>alert(1)</script>&\x1b[31m\u202e\ud800 $x^2$'
    rows = [(name, [(1.0, 0.1), None], [0.5])]
    bars = draw_bars("b", name, name, rows, x=name, labels=[name, "b"], mark="chance")
    for drawn in (bars, chart(([1.0, 2.0], [1.0, 2.0]), title=name, alt=name, y=name, levels=[(name, 1.5)])):
        root = ElementTree.fromstring(standalone(drawn))
        assert not [element for element in root.iter() if element.tag.endswith("script")]
        assert root.tag == f"{SVG}svg"
        assert any("<script>alert(1)" in word for word in words(standalone(drawn)))


def test_pictures_use_the_pages_colours_and_unique_ids():
    """Guards against pictures that stay light on a dark page, and against one that shows the markers of another."""
    first, second = (chart(([1.0, 2.0], [1.0, 2.0]), name=name).svg for name in "ab")
    assert "#" not in re.sub(r'(href="|url\()#', "", first)
    assert "var(--c0)" in first
    ids = [set(re.findall(r' id="([^"]*)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_smoothing_is_a_moving_mean():
    values = [9.0 if i == 20 else 0.0 for i in range(41)]
    assert smooth(values)[16:25] == pytest.approx([1.0] * 9)
    line = [3.0 - 0.5 * i for i in range(99)]
    assert smooth(line)[4:-4] == pytest.approx(line[4:-4])
    assert smooth(line)[0] == pytest.approx(2.0), "the mean of what is there"
    assert smooth([5.0]) == [5.0]


def test_charts_follow_the_logged_metrics(made):
    lines = [
        {"iteration": i, "loss": 5.0 / i, "lr_multiplier": 1.0, "grad_norm": 0.5, "tokens_per_second": 1e5,
         "val_loss": 1.0, "val_perplexity": 2.7, "data_wait_frac": 0.2, "own": 3.0}
        for i in range(1, 40)
    ]  # fmt: skip
    made.write_lines("sft", "metrics.jsonl", lines)
    passes = {f"pass_at_{k}": 0.5 for k in range(1, 9)}
    lines = [{"iteration": i, "reward": 0.1 * i, **passes, "pass_at_1_stderr": 0.05} for i in range(5)]
    made.write_lines("rl", "metrics.jsonl", lines)
    report = made.report()
    sft, rl = report.step("sft"), report.step("rl")
    assert [chart.name for chart in main_charts(report, sft)] == ["sft-loss", "sft-val_loss"]
    more = ["sft-lr_multiplier", "sft-grad_norm", "sft-tokens_per_second", "sft-own"]
    assert [chart.name for chart in more_charts(report, sft)] == more
    assert [chart.name for chart in main_charts(report, rl)] == ["rl-reward", "rl-pass"]
    passed = main_charts(report, rl)[1]
    assert "pass@1 ends at 50.0% ± 5.0; pass@2 ends at 50.0%; pass@4" in passed.alt
    assert len(passed.draw().axes[0].collections) == 1, "a band of standard errors"
    assert main_charts(report, report.step("corpus")) == []


def test_three_sizes_are_drawn_with_a_power_law():
    points = {f"d{i}": (1e15 * 10**i, 2.0 * 10 ** (-0.05 * i)) for i in range(3)}
    assert "fitted: 1.783 · (FLOPs / 1e+16)^(−0.050)" in scaling_chart(points).alt  # 2 · 10^-0.05 in the middle
    assert scaling_chart({name: points[name] for name in ("d0", "d1")}) is None
