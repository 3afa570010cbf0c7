// Elements for messages and models.

import { growing, make, scrolling, shown } from "./markdown.js";

const SUM = /^[\d\s.,+\-*/%()]*$/;
const COUNT = /^\s{0,9}(['"])[^'"\n]{0,200}\1\s{0,9}\.\s{0,9}count\([^()\n]{0,200}\)\s{0,9}$/;
// Private-use characters around the number of a call in Markdown.
const CALL = /\ue000(\d{1,9})\ue001/;
const SLICE_MILLISECONDS = 8;
const SLICE_CHARACTERS = 4000;

/** Copy a text and say so on the button. */
export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no clipboard without HTTPS from another machine
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

/** Return the text of a message, without calls and their results. */
export function textOf(message) {
  return message.parts.filter((part) => part.type === "text").map((part) => part.text).join("");
}

// ---- texts of messages ----

const texts = new WeakMap(); // message → element of its text
const waiting = []; // generators that render these texts in slices, the newest message last

/** Return the element of a message's text, plain until `renderWaiting` renders it. */
function textElement(message) {
  if (!texts.has(message)) {
    const element = make("div", { class: "said", dir: "auto" }, shown(textOf(message)));
    texts.set(message, element);
    if (message.role === "assistant" && message.parts.length) waiting.push(slices(message));
  }
  return texts.get(message);
}

/** Render a message's text so far, one slice per step; yield whether that is all of it. */
export function* slices(message) {
  const element = textElement(message);
  element.replaceChildren();
  const show = growing(element);
  let [size, end, kept] = [SLICE_CHARACTERS, 0, 0];
  for (;;) {
    const { text, calls } = asMarkdown(message.parts);
    end = Math.min(end + size, text.length);
    const stays = show(text.slice(0, end), (fragment) => placeCalls(fragment, calls));
    if (stays === kept && end < text.length) size *= 2; // a block of many slices is not rendered again for each
    kept = stays;
    yield end === text.length;
  }
}

/** Render waiting texts and `more`, newest first, for a few milliseconds per frame. */
export async function renderWaiting(...more) {
  waiting.push(...more);
  for (let ends = performance.now() + SLICE_MILLISECONDS; waiting.length;) {
    const next = waiting.pop();
    if (!next.next().value) waiting.push(next);
    if (performance.now() < ends) continue;
    await new Promise(requestAnimationFrame);
    ends = performance.now() + SLICE_MILLISECONDS;
  }
}

/** Return the parts of a message as Markdown with a mark for each call, and the calls. */
function asMarkdown(parts) {
  const calls = [];
  let text = "";
  parts.forEach((part, at) => {
    if (part.type === "text") text += part.text.replace(/[\ue000\ue001]/g, "\ufffd");
    else if (part.type === "python_output" && parts[at - 1]?.type === "python") calls.at(-1).result = part.text;
    else {
      text += `\ue000${calls.length}\ue001`;
      calls.push(part.type === "python" ? { call: part.text, result: null } : { call: "", result: part.text });
    }
  });
  return { text, calls };
}

function placeCalls(fragment, calls) {
  if (!calls.length) return;
  const nodes = document.createTreeWalker(fragment, NodeFilter.SHOW_TEXT);
  const marked = [];
  while (nodes.nextNode()) if (CALL.test(nodes.currentNode.data)) marked.push(nodes.currentNode);
  for (const node of marked) {
    node.replaceWith(...node.data.split(CALL).map((piece, at) => (at % 2 ? callElement(calls[piece]) : piece)));
  }
}

function callElement({ call, result }) {
  const code = (text) => make("code", {}, shown(text));
  if (SUM.test(call) || COUNT.test(call)) {
    return make("details", { class: "tool" }, make("summary", {}, "calculator"),
      make("div", {}, code(call), result === null ? "" : " = ", code(result ?? "")));
  }
  const pre = (name, text) => scrolling(make("pre", {}, code(text)), name);
  return make("details", { class: "tool program" }, make("summary", {}, result === null ? "Python" : "Python and its output"),
    pre("Program", call.trim()), result === null ? [] : pre("Output", result));
}

// ---- messages ----

/** Return the length of an answer, with its rate if `milliseconds` (first to last text) are long enough to measure. */
export function pace(tokens, milliseconds) {
  const count = `${tokens} token${tokens === 1 ? "" : "s"}`;
  // The first token belongs to reading the prompt; text that arrives in one burst was computed earlier.
  return milliseconds < 500 || tokens < 5 ? count : `${count}, ${((1000 * (tokens - 1)) / milliseconds).toPrecision(2) * 1}/s`;
}

/** Return buttons to switch between versions of a message; the one at `place` is shown. */
export function versionSwitch(place, count, show) {
  const button = (label, text, to) => {
    const made = make("button", { type: "button", "aria-label": label, title: label, onclick: () => show(to) }, text);
    made.disabled = to < 0 || to >= count;
    return made;
  };
  return make("span", { class: "versions" },
    button("Earlier version", "‹", place - 1), make("span", {}, `${place + 1} of ${count}`), button("Later version", "›", place + 1));
}

/** Return a message's element, always the same one; `actions` are [label, handler] of its buttons, or elements. */
export function messageElement(message, actions, note) {
  const row = make("div", { class: "actions" }, actions.map((action) => {
    if (action instanceof Element) return action;
    return make("button", { type: "button", onclick: ({ target }) => action[1](target) }, action[0]);
  }));
  if (note) row.append(make("span", { class: "note" }, note));
  const who = make("span", { class: "unseen" }, message.role === "user" ? "You said:" : "The model said:");
  const said = textElement(message);
  const item = said.parentElement ?? make("li", {}, said);
  item.className = message.role;
  item.removeAttribute("aria-busy");
  for (const other of [...item.children]) if (other !== said) other.remove();
  said.before(...omission(message.left_out), who);
  said.after(row);
  return item;
}

/** Return the line above an answer with the number of earlier turns that the model did not read. */
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

// ---- models ----

export const day = (time) => new Date(time).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });

/** Return id → name of each model: stage and parameters, then what distinguishes models of equal name. */
export function namesOf(models) {
  const names = models.map(({ mlxchat: { step, stage, label, parameters } }) => (
    [stage === "imported" ? label : step, parameters && short(parameters)].filter(Boolean).join(" · ")));
  for (const more of [({ mlxchat }) => shown(mlxchat.run ?? day(mlxchat.published)), ({ id }) => id.slice(-16, -8)]) {
    const count = new Map();
    for (const name of names) count.set(name, (count.get(name) ?? 0) + 1);
    models.forEach((one, at) => { if (count.get(names[at]) > 1) names[at] += ` · ${more(one)}`; });
  }
  return new Map(models.map(({ id }, at) => [id, names[at]]));
}

/** Return a model's provenance and scores. */
export function provenance(model, detail) {
  const own = model.mlxchat;
  const facts = [
    ["Parameters", own.parameters?.toLocaleString()], ["Made", day(own.published)],
    ["From", Object.values(own.inputs ?? {}).join(", ")], ["Run", own.run], ["Seed", detail?.mlxchat.seed],
    ["Commit", detail?.mlxchat.git?.commit?.slice(0, 12)], ["Id", model.id],
  ].filter(([, value]) => value !== undefined && value !== null && value !== "");
  const nodes = [make("dl", {}, facts.flatMap(([key, value]) => [make("dt", {}, key), make("dd", {}, String(value))]))];
  if (!own.converses) nodes.unshift(make("p", { class: "note" }, "A base model: it continues text and cannot chat."));
  for (const [title, numbers] of [["Scores", own.scores], ["From its training", own.metrics]]) {
    if (Object.keys(numbers ?? {}).length) nodes.push(measured(title, numbers));
  }
  if (detail?.mlxchat.config) {
    nodes.push(make("details", {}, make("summary", {}, "Configuration"),
      scrolling(make("pre", {}, JSON.stringify(detail.mlxchat.config, null, 1)), "Configuration")));
  }
  return nodes;
}

/** Return numbers as a table with standard errors and readable sizes. */
export function measured(title, numbers) {
  const rows = Object.entries(numbers).filter(([key]) => !key.endsWith("_stderr")).map(([key, value]) => {
    const name = key.replace(/_bytes$/, "").replaceAll("_per_second", " / s").replaceAll("_", " ");
    const shown = key.endsWith("_bytes") ? size(value) : plain(value, numbers[`${key}_stderr`]);
    return make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, shown));
  });
  return make("table", { class: "numbers" }, make("caption", {}, title), make("tbody", {}, rows));
}

function short(value) {
  return value.toLocaleString("en", { notation: "compact" });
}

function size(bytes) {
  const at = Math.min(3, Math.floor(Math.log10(Math.max(1, bytes)) / 3));
  return `${(bytes / 1000 ** at).toPrecision(3) * 1} ${["B", "kB", "MB", "GB"][at]}`;
}

function plain(value, error) {
  if (!error) return value.toLocaleString([], { maximumSignificantDigits: 4 });
  const decimals = Math.min(9, Math.max(0, -Math.floor(Math.log10(error))));
  return `${value.toFixed(decimals)} ± ${error.toFixed(decimals)}`;
}
