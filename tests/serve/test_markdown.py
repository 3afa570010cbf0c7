"""The page's modules: Markdown in linear time, elements by name, growth that equals a whole text; versions of messages.

What needs no document runs under Node.js, the rest in a browser.
"""

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mlxchat

PAGE = Path(mlxchat.__file__).parent / "serve" / "page"
_NODE = """
import { readFileSync } from "node:fs";
const [place, given] = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify((CODE)(await import(place), given)));
"""
RUN = "({ html }, texts) => texts.map((text) => html(text))"
RENDERED = [
    ("# a", "<h2>a</h2>"),
    ("# C#", "<h2>C#</h2>"),
    ("#### 19", "<p>Answer: <strong>19</strong></p>"),
    ("a\nb", "<p>a<br>b</p>"),
    ("-   a\n- b", "<ul><li>a</li><li>b</li></ul>"),
    ("a | b\n:- | -:\n1 | 2", '<table><thead><tr><th class="left">a</th><th class="right">b</th></tr></thead>'
     '<tbody><tr><td class="left">1</td><td class="right">2</td></tr></tbody></table>'),
    ("*a* __b__ ~~c~~", "<p><em>a</em> <strong>b</strong> <s>c</s></p>"),
    ("<b>a</b>", "<p>&lt;b&gt;a&lt;/b&gt;</p>"),
    ("[a]( https://x.example/ \"t\" )", '<p><a href="https://x.example/" title="t">a</a></p>'),
    ("[a](javascript:b)", "<p>[a](javascript:b)</p>"),
    ("![a](https://x.example/)", '<p><a href="https://x.example/">a</a></p>'),
    ("[a]\n\n[a]: https://x.example/", "<p>[a]</p><p>[a]: https://x.example/</p>"),
    ("a &#x202e; <https://x.example/%E2%80%AE>", '<p>a \ufffd <a href="https://x.example/%E2%80%AE">'
     "https://x.example/\ufffd</a></p>"),
]  # fmt: skip


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Call a JavaScript function with (a module of the page, JSON); without Node.js the test is skipped."""
    if shutil.which("node") is None:
        pytest.skip("no Node.js on this machine")
    folder = shutil.copytree(PAGE, tmp_path_factory.mktemp("node") / "page")
    (folder / "package.json").write_text('{"type": "module"}')

    def run(module: str, code: str, given: Any) -> Any:
        command = ["node", "--input-type=module", "-e", _NODE.replace("CODE", code)]
        given = json.dumps([(folder / module).as_uri(), given])
        done = subprocess.run(command, input=given, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_markdown_blocks_and_marks_render(node):
    found = node("markdown.js", RUN, [text for text, _ in RENDERED])
    for (text, html), said in zip(RENDERED, found, strict=True):
        assert said.replace("\n", "") == html, text


def test_vendored_files_have_their_recorded_digests_and_licences():
    folder = PAGE / "vendor"
    rows = re.findall(
        r"^\| (\S+\.min\.\S+) \|.*, (\S+) \| (\w{64}) \|$", (folder / "README.md").read_text(), re.MULTILINE
    )
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.min.*")}
    assert {file: digest for file, _, digest in rows} == digests
    assert all((folder / licence).read_text() for _, licence, _ in rows)


@pytest.fixture(scope="module")
def document(browser: Any, start: Callable[..., Any]) -> Iterator[Any]:
    with start(seconds=0.001) as server:
        page = browser.new_page()
        page.goto(server.url)
        yield page
        page.close()


GROWN = """
async ([text, sizes]) => {
  const { growing } = await import("/page/markdown.js");
  const grow = (ends) => {
    const element = document.createElement("div");
    const show = growing(element);
    for (const end of ends) show(text.slice(0, end));
    return element.innerHTML.replaceAll("\\n", "");
  };
  const ends = [...Array(Math.ceil(text.length / sizes)).keys()].map((at) => (at + 1) * sizes);
  return [grow(ends), grow([text.length])];
}
"""
DOCUMENT = (
    "# Top\n\nSome **bold** text\nand a second line\n\n- one\n\n  with a paragraph\npara\n===\n"
    "1. a\n   ```python\n   x = 1\n\n   ```\n\n> quote\nlazy\n\na | b\n-|-\n1 | 2\n\n```\nopen fence\n"
)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("text", [DOCUMENT, "- a\n#\n#b\n\n\n-\n- c\n\n-\nx\n-"])
def test_incremental_rendering_equals_whole_rendering(document, text, size):
    grown, whole = document.evaluate(GROWN, [text, size])
    assert grown == whole


@pytest.mark.slow
def test_sanitizer_allows_markdown_elements_only(document):
    """DOMPurify alone must stop what markdown-it lets through."""
    found = document.evaluate("""async () => {
      const { growing } = await import("/page/markdown.js");
      const element = document.createElement("div");
      const original = String.prototype.replace;
      // As if the parser escaped nothing.
      String.prototype.replace = function (...given) { return original.apply(original.apply(this, given)
        .replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&quot;", '"'), [/$^/, ""]); };
      try {
        growing(element)('<img src=x onerror="window.hurt=1"><a href="javascript:window.hurt=1" onclick="x">a</a>' +
          '<svg onload=x><script>window.hurt=1</' + 'script></svg>' +
          '<p style="position:fixed" id=send>b</p><form>c</form>');
      } finally { String.prototype.replace = original; }
      document.body.append(element);
      return element.innerHTML;
    }""")
    assert "<p>b</p>" in found, "the parser's escaping was off"
    assert not re.search(r"<(img|svg|script|form)|\son\w+=|javascript:|style=|\sid=", found)
    assert document.evaluate("() => window.hurt") is None


TALK = """
(page, steps) => {
  const talk = { messages: [], last: -1 };
  const texts = (messages) => messages.map((message) => message.parts[0].text).join(" ");
  const message = (text) => ({ role: text[0] === "u" ? "user" : "assistant", parts: [{ text }] });
  const say = (text, parent) => page.append(talk, message(text), parent);
  const told = [];
  for (const [what, ...given] of steps) {
    if (what === "say") say(...given);
    if (what === "answer") talk.last = say(...given);
    if (what === "choose") page.choose(talk, ...given);
    if (what === "versions") told.push(page.versionsOf(talk, ...given));
    if (what === "path") told.push(texts(page.pathOf(talk).map((index) => talk.messages[index])));
    if (what === "read") {
      const { messages, omitted } = page.readable(talk, page.pathOf(talk));
      told.push([texts(messages).slice(0, 40), omitted]);
    }
  }
  return told;
}
"""
TWO_TURNS = [["say", "u1", -1], ["answer", "a1", 0], ["say", "u2", 1], ["answer", "a2", 2]]
LONG = "a" * 100_000
# The server refuses bodies above 1 MB, so without the cut every further message would fail.
STEPS = {
    "a new answer to an early message keeps the later turns": (
        [*TWO_TURNS, ["answer", "a1b", 0], ["path"], ["versions", 4], ["choose", 1], ["path"]],
        ["u1 a1b", [1, 4], "u1 a1 u2 a2"],
    ),
    "an edited message appears once answered": (
        [
            *TWO_TURNS,
            ["say", "u1b", -1],
            ["path"],
            ["versions", 0],
            ["answer", "a1b", 4],
            ["path"],
            ["choose", 0],
            ["path"],
        ],
        ["u1 a1 u2 a2", [0, 4], "u1b a1b", "u1 a1 u2 a2"],
    ),
    "unanswered messages are not sent": (
        [*TWO_TURNS, ["say", "u3", 3], ["say", "u4", 4], ["path"], ["read"]],
        ["u1 a1 u2 a2 u3 u4", ["u1 a1 u2 a2 u4", 0]],
    ),
    "a long conversation is cut at a turn": (
        [["say", "u1", -1], ["answer", LONG, 0], ["say", "u2", 1], ["answer", LONG, 2], ["say", "u3", 3], ["read"]],
        [["u2 " + "a" * 37, 1]],
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_versions_of_messages_and_what_is_sent(node, name):
    steps, told = STEPS[name]
    assert node("conversation.js", TALK, steps) == told
