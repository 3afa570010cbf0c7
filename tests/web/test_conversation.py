"""Versions of messages in the page, and what the page sends to the model."""

from collections.abc import Callable
from typing import Any

RUN = """
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


def run(node: Callable[..., Any], *steps: list[Any]) -> list[Any]:
    return node("conversation.js", RUN, steps)


def test_new_answer_to_an_early_message_keeps_the_later_turns(node):
    told = run(node, *TWO_TURNS, ["answer", "a1b", 0], ["path"], ["versions", 4], ["choose", 1], ["path"])
    assert told == ["u1 a1b", [1, 4], "u1 a1 u2 a2"]


def test_edited_message_appears_once_answered(node):
    told = run(node, *TWO_TURNS, ["say", "u1b", -1], ["path"], ["versions", 0], ["answer", "a1b", 4], ["path"],
               ["choose", 0], ["path"])  # fmt: skip
    assert told == ["u1 a1 u2 a2", [0, 4], "u1b a1b", "u1 a1 u2 a2"]


def test_unanswered_messages_are_not_sent(node):
    told = run(node, *TWO_TURNS, ["say", "u3", 3], ["say", "u4", 4], ["path"], ["read"])
    assert told == ["u1 a1 u2 a2 u3 u4", ["u1 a1 u2 a2 u4", 0]]


def test_long_conversation_is_cut_at_a_turn(node):
    """The server refuses bodies above 1 MB, so without this every further message would fail."""
    long = "a" * 100_000
    steps = [["say", "u1", -1], ["answer", long, 0], ["say", "u2", 1], ["answer", long, 2], ["say", "u3", 3], ["read"]]
    assert run(node, *steps) == [["u2 " + "a" * 37, 1]]
