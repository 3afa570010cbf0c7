// Messages as elements.

import { fill, make, renderInline, renderMarkdown, shown } from "./markdown.js";

const SUM = /^[\d\s.,+\-*/%()]*$/;
const COUNT = /^\s{0,9}(['"])[^'"\n]{0,200}\1\s{0,9}\.\s{0,9}count\([^()\n]{0,200}\)\s{0,9}$/;

/** Copy a text; the button says that it was. */
export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // pages that came unencrypted from another machine have no clipboard
    const field = make("textarea", { class: "unseen" });
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  const label = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = label; }, 1200);
}

/** Return what was said, without calls and what they gave. */
export function textOf(message) {
  return message.parts.filter((part) => part.type === "text").map((part) => part.text).join("");
}

/** Return a message's text as nodes: markdown, with calls of the calculator folded where they stand. */
export function renderParts(parts) {
  if (parts.every((part) => part.type === "text")) return renderMarkdown(parts.map((part) => part.text).join(""), copy);
  const nodes = [];
  for (let at = 0; at < parts.length; at += 1) {
    const part = parts[at];
    if (part.type === "text") {
      placeText(nodes, part.text);
    } else {
      const answer = part.type === "python" && parts[at + 1]?.type === "python_output" ? parts[at += 1].text : null;
      const [call, result] = part.type === "python" ? [part.text, answer] : ["", part.text];
      if (SUM.test(call) || COUNT.test(call)) lastParagraph(nodes).append(calculation(shown(call), result));
      else nodes.push(program(shown(call), result));
    }
  }
  return nodes;
}

// Text around calls goes on in the paragraph that they stand in.
function placeText(nodes, text) {
  const [first, ...rest] = shown(text).split("\n");
  const goesOn = nodes.length && nodes.at(-1).tagName === "P" && first.trim();
  if (goesOn) for (const node of renderInline(first)) lastParagraph(nodes).append(node);
  for (const node of renderMarkdown(goesOn ? rest.join("\n") : text, copy)) nodes.push(node);
}

function lastParagraph(nodes) {
  if (nodes.at(-1)?.tagName !== "P") nodes.push(make("p"));
  return nodes.at(-1);
}

function calculation(call, result) {
  return make("details", { class: "tool" }, make("summary", {}, "calculator"),
    make("div", {}, make("code", {}, call), result === null ? "" : " = ", make("code", {}, result ?? "")));
}

function program(call, result) {
  const pre = (name, text) => make("pre", { tabindex: "0", role: "region", "aria-label": name }, make("code", {}, text));
  return make("details", { class: "tool program" }, make("summary", {}, result === null ? "Python" : "Python and its output"),
    pre("Program", call.trim()), ...(result === null ? [] : [pre("Output", shown(result))]));
}

/** Return the length of an answer, with its rate if `milliseconds` from its first text to its last one measure any. */
export function pace(tokens, milliseconds) {
  const count = `${tokens} token${tokens === 1 ? "" : "s"}`;
  // The first token came with the reading of the prompt. What arrives in one burst was computed before.
  return milliseconds < 500 || tokens < 5 ? count : `${count}, ${((1000 * (tokens - 1)) / milliseconds).toPrecision(2) * 1}/s`;
}

/** Return buttons that go through the versions of a message, of which the one at `place` is shown. */
export function versionSwitch(place, count, show) {
  const button = (label, text, to) => {
    const made = make("button", { type: "button", "aria-label": label, title: label, onclick: () => show(to) }, text);
    made.disabled = to < 0 || to >= count;
    return made;
  };
  return make("span", { class: "versions" },
    button("Earlier version", "‹", place - 1), make("span", {}, `${place + 1} of ${count}`), button("Later version", "›", place + 1));
}

/** Return a message's element; `actions` are [label, what it does] of its buttons, or elements. */
export function messageElement(message, actions, note) {
  const said = make("div", { class: "said", dir: "auto" });
  if (message.role === "user") said.textContent = shown(textOf(message));
  else fill(said, renderParts(message.parts));
  const row = make("div", { class: "actions" });
  for (const action of actions) {
    if (action instanceof Element) {
      row.append(action);
      continue;
    }
    const [label, act] = action;
    const button = make("button", { type: "button" }, label);
    button.addEventListener("click", () => act(button));
    row.append(button);
  }
  if (note) row.append(make("span", { class: "note" }, note));
  const who = make("span", { class: "unseen" }, message.role === "user" ? "You said:" : "The model said:");
  return make("li", { class: message.role }, ...omission(message.left_out), who, said, row);
}

/** Return the line above an answer that says how many earlier turns the model did not read. */
export function omission(turns) {
  if (!Number.isInteger(turns) || turns < 1) return [];
  const what = turns === 1 ? "1 earlier turn was" : `${turns} earlier turns were`;
  return [make("p", { class: "note left-out" }, `${what} left out for this answer: the conversation is longer than the model can read.`)];
}

/** Return a form to edit a text. */
export function editor(text, save, cancel) {
  const field = make("textarea", { rows: String(Math.min(12, text.split("\n").length + 1)), "aria-label": "Edit your message" });
  field.value = text;
  const form = make("form", { class: "editing" }, field, make("div", { class: "row" },
    make("button", { type: "button", onclick: cancel }, "Cancel"), make("button", { class: "main" }, "Send")));
  form.addEventListener("submit", (event) => { event.preventDefault(); if (field.value.trim()) save(field.value.trim()); });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); cancel(); }
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
  });
  return { form, field };
}

/** Return where a model comes from, as lists. */
export function provenance(model, detail) {
  const own = model.mlxchat;
  const facts = [
    ["id", model.id], ["step", own.step + (own.converses ? "" : " (continues text)")], ["run", own.run ?? "?"],
    ["made", new Date(own.published).toLocaleString()], ["from", Object.values(own.inputs ?? {}).join(", ")],
    ["seed", detail?.mlxchat.seed], ["git", detail?.mlxchat.git?.commit?.slice(0, 12)],
  ].filter(([, value]) => value !== undefined && value !== "");
  const nodes = [definitions(facts)];
  for (const [title, numbers] of [["Scores", own.scores], ["Metrics of its training", own.metrics]]) {
    const rows = Object.entries(numbers ?? {}).map(([key, value]) => [key, show(value)]);
    if (rows.length) nodes.push(make("h3", {}, title), definitions(rows, "numbers"));
  }
  if (detail?.mlxchat.config.schema) {
    nodes.push(make("details", {}, make("summary", {}, "Configuration"),
      make("pre", { tabindex: "0" }, JSON.stringify(detail.mlxchat.config.schema, null, 1))));
  }
  nodes.push(make("p", { class: "note" }, `All about it: mlxchat show ${model.id}`));
  return nodes;
}

function show(value) {
  return Number.isInteger(value) ? value.toLocaleString() : Number(value.toPrecision(4)).toString();
}

function definitions(rows, kind = "") {
  return make("dl", { class: kind }, ...rows.flatMap(([key, value]) => [make("dt", {}, key), make("dd", {}, String(value))]));
}
