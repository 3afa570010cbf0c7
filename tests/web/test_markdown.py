"""The page's Markdown: rendering takes time linear in the text's length, and the blocks are told apart correctly.

The module runs under Node.js with a document of a few lines, so no browser is needed.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mlxchat

PAGE = Path(mlxchat.__file__).parent / "serve" / "page"
# A regular expression stands where an operand may: after an opening parenthesis, an operator or a comma.
EXPRESSION = re.compile(r"[(=,:!&|?]\s?/(?![/*])((?:\\.|\[(?:\\.|[^\]\\])*\]|[^/\\\[\n])+)/[a-z]*")
UNITS = [
    " ", "\t", "\r", "\u2028", "#", "*", "*a ", "**a ", "_a ", "__a ", "~~a ", "**", "`", "`` ", "```", "[", "[](",
    "[a](b", "![", "]", "(", "|", "| ", "|-", "- ", "-", ":-", "> ", ">", "1. ", "  - a\n", "> - a\n", "a\n", "\n",
    "\\", "*a*_b_",
]  # fmt: skip
PLACES = [
    ("", "b"), ("# a", "b"), ("# ", " #b"), ("- a", "\u2028b"), ("a|b\n", "b"), ("a|b\n|-|-", "x"), ("--", "x"),
    ("[a](b", ""), ("> ", ""), ("*a", ""),
]  # fmt: skip
RUN = """
({ renderMarkdown }, cases) => {
  class Element {
    constructor(name) { this.name = name; this.children = []; }
    append(...children) { this.children.push(...children); }
    setAttribute() {}
    addEventListener() {}
  }
  globalThis.document = { createElement: (name) => new Element(name) };
  const html = (node) =>
    typeof node === "string" ? node : `<${node.name}>${node.children.map(html).join("")}</${node.name}>`;
  const spent = (work) => {
    const before = process.cpuUsage();
    work();
    const { user, system } = process.cpuUsage(before);
    return (user + system) / 1000;
  };
  const render = (text) => renderMarkdown(text, () => {});
  const least = (text) => Math.min(...[1, 2, 3].map(() => spent(() => render(text))));
  // Time of four times the text to time of the text, at the first length that can be measured: 4 if linear, else 16 on.
  const growth = ([before, unit, after]) => {
    const text = (length) => before + unit.repeat(Math.ceil(length / unit.length)) + after;
    for (let length = 500; length <= 32000; length *= 2) {
      if (spent(() => render(text(length))) < 40) continue;
      const time = least(text(length));
      if (time > 40) return least(text(4 * length)) / time;
    }
    return 0;
  };
  return cases.map((one) => Array.isArray(one) ? growth(one) : render(one).map(html).join(""));
}
"""


@pytest.mark.parametrize("path", sorted(PAGE.glob("*.js")), ids=lambda path: path.name)
def test_expressions_have_one_anchored_unbounded_quantifier_at_most(path: Path) -> None:
    """Two of them that meet made headings cubic; one that is not anchored is quadratic."""
    for expression in EXPRESSION.findall(path.read_text(encoding="utf-8")):
        bare = re.sub(r"\[(?:\\.|[^\]\\])*\]|\\.", "x", expression)
        unbounded = re.findall(r"[*+]|\{\d+,\}", bare)
        assert len(unbounded) <= (1 if bare.startswith("^") else 0), expression


def test_the_expressions_of_the_page_are_found() -> None:
    found = EXPRESSION.findall((PAGE / "markdown.js").read_text(encoding="utf-8"))
    assert len(found) > 15
    assert r"^ {0,3}(#{1,6})\s" in found


@pytest.mark.parametrize("unit", UNITS, ids=repr)
def test_time_is_linear_in_the_length_of_the_text(node: Callable[..., Any], unit: str) -> None:
    """`# a`, 2,000 spaces and `b` took seconds a frame."""
    growths = dict(
        zip(PLACES, node("markdown.js", RUN, [(before, unit, after) for before, after in PLACES]), strict=True)
    )
    assert {place: growth for place, growth in growths.items() if growth > 9} == {}


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("# a", "<h2>a</h2>"),
        ("###### a ##", "<h5>a</h5>"),
        ("# C#", "<h2>C#</h2>"),
        ("# C #\t", "<h2>C</h2>"),
        ("## ##", "<h3></h3>"),
        ("#a", "<p>#a</p>"),
        ("- - -", "<hr></hr>"),
        ("***", "<hr></hr>"),
        ("--", "<p>--</p>"),
        ("-*-", "<p>-*-</p>"),
        ("-   a\n- b", "<ul><li>a</li><li>b</li></ul>"),
        ("3. a", "<ol><li>a</li></ol>"),
        ("~~~~ c++ x\n~~~\n~~~~", "<figure><figcaption><span>c++</span><button>Copy</button></figcaption>"
         "<pre><code>~~~</code></pre></figure>"),
        ("a | b\n:- | -:\n1 | 2", "<div><table><thead><tr><th>a</th><th>b</th></tr></thead>"
         "<tbody><tr><td>1</td><td>2</td></tr></tbody></table></div>"),
        ("a | b\n-|-\n1 | 2 | *3*\n4 |", "<div><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody>"
         "<tr><td>1</td><td>2 | <em>3</em></td></tr><tr><td>4</td><td></td></tr></tbody></table></div>"),
        ("a | b\n- | x", "<p>a | b</p><ul><li>| x</li></ul>"),
        ("*a *b*", "<p><em>a *b</em></p>"),
        ("*a *b ~~c~~", "<p>*a *b <del>c</del></p>"),
        ("_a_b_ *c", "<p><em>a_b</em> *c</p>"),
        ("[a]( https://x.example/ \"t\" )", "<p><a>a</a></p>"),
    ],
)  # fmt: skip
def test_blocks_and_marks_become_elements(node: Callable[..., Any], text: str, html: str) -> None:
    assert node("markdown.js", RUN, [text]) == [html]


def test_marks_upon_marks_are_cut(node: Callable[..., Any]) -> None:
    """A browser took 9 s to lay out a character with 32,000 accents; no script needs more than a few."""
    assert node("markdown.js", RUN, ["e\u0301 a" + "\u0300" * 9_000 + " b"]) == [
        f"<p>e\u0301 a{chr(0x300) * 16}… b</p>"
    ]


def test_table_has_fifty_columns_at_most(node: Callable[..., Any]) -> None:
    """A browser took half a minute to lay out 1,500 columns and 3,750 rows, which are 12,000 characters."""
    [html] = node("markdown.js", RUN, ["|".join("a" * 1500) + "\n" + "|".join("-" * 1500) + "\n" + "b|\n" * 3750])
    rows = html.split("</tr>")[:-1]
    assert {(row.count("<th>"), row.count("<td>")) for row in rows} == {(50, 0), (0, 2)}
    assert (html.count("a |"), html.count("<td>b</td>")) == (1450, 3750), "what is beyond stands in the last column"


@pytest.mark.parametrize("unit", ["a\n", "*a* ", "> *a* b\n", "a|b\n|-|-\n*a*|*b*\n", "- a\n"], ids=repr)
def test_long_text_does_not_overflow_the_stack(node: Callable[..., Any], unit: str) -> None:
    """A paragraph of 70,000 lines was a call with 140,000 arguments, and the page showed nothing."""
    [html] = node("markdown.js", RUN, [unit * 70_000])
    assert html.count("a") >= 70_000


MESSAGE = """
class Element {
  constructor(name) { this.tagName = name.toUpperCase(); this.children = []; this.classList = { add() {} }; }
  append(...children) { this.children.push(...children); }
  replaceChildren() { this.children = []; }
  setAttribute() {}
  addEventListener() {}
}
globalThis.Element = Element;
globalThis.document = { createElement: (name) => new Element(name) };
import("./view.js").then(({ messageElement }) => {
  const text = { type: "text", text: "a\\n\\n".repeat(150000) };
  const call = { type: "python", text: "1+1" };
  const said = (parts) => messageElement({ role: "assistant", parts }, []).children[1].children.length;
  console.log(JSON.stringify([said([text]), said([call, text])]));
});
"""


def test_message_of_many_paragraphs_does_not_overflow_the_stack(tmp_path: Path) -> None:
    """150,000 paragraphs were a call with as many arguments."""
    if shutil.which("node") is None:
        pytest.skip("no Node.js on this machine")
    folder = shutil.copytree(PAGE, tmp_path / "page")
    (folder / "package.json").write_text('{"type": "module"}')
    done = subprocess.run(["node", "-e", MESSAGE], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [150_000, 150_000]
