// The chat page: state and event handlers.

import { append, choose, fresh, isUnanswered, parentOf, pathOf, readable, versionsOf } from "./conversation.js";
import { make, shown } from "./markdown.js";
import { listModels, setKey, showModel, stream } from "./server.js";
import { DEFAULTS, dropAll, dropConversation, keepConversation, keepOpen, readConversations, readOpen, readSettings, writeSettings } from "./store.js";
import { copy, editor, messageElement, namesOf, omission, pace, provenance, renderWaiting, slices, textOf, versionSwitch } from "./view.js";

const $ = (id) => document.getElementById(id);
const settings = readSettings();
const EXAMPLES = ["What is the capital of France?", "Who are you?", "Mia has 12 candles and buys 7 more. How many candles does Mia have now?"];
const BEGINNINGS = ["The capital of France is", "Once upon a time"];

let models = [];
let names = new Map(); // id of a model → its name
let followed = true; // whether the view follows the end of the conversation
let conversation = fresh();
let going = null; // the answer in progress: {asked, path, message, element, controller, keep(note) stores what has arrived}
let editing = null; // index of the message that is being edited

function model() {
  return models.find((one) => one.id === settings.model) ?? models[0];
}

// ---- rendering ----

function showAll() {
  showList();
  showMessages();
  showModelName();
}

function showList() {
  const all = readConversations();
  $("list").replaceChildren(...all.map((one) => {
    const title = titleOf(one);
    const isOpen = one.id === conversation.id;
    const drop = () => {
      if (!window.confirm(`Delete “${title}”?`)) return;
      dropConversation(one.id);
      if (isOpen) begin();
      else showList();
    };
    return make("li", { class: isOpen ? "open" : "" },
      make("button", { class: "name", type: "button", title, dir: "auto", "aria-current": isOpen, onclick: () => openConversation(one.id) }, title),
      make("button", { class: "drop", type: "button", "aria-label": `Delete “${title}”`, onclick: drop }, "✕"));
  }));
}

function titleOf(one) {
  return one.messages.length ? shown(textOf(one.messages[pathOf(one)[0] ?? 0])).slice(0, 80) : "New conversation";
}

function showMessages() {
  const { messages } = conversation;
  const coming = going?.asked === conversation ? going : null;
  const path = coming ? coming.path : pathOf(conversation);
  document.title = messages.length ? `${titleOf(conversation)} · mlxchat` : "mlxchat";
  const several = new Set(messages.filter((one) => one.model).map((one) => one.model)).size > 1;
  $("empty").hidden = messages.length > 0;
  const elements = path.map((index, place) => {
    const message = messages[index];
    if (index === editing) return editElement(message, index);
    const unanswered = isUnanswered(conversation, path, place) && !(coming && place === path.length - 1);
    const actions = [["Copy", (button) => copy(textOf(message), button)]];
    if (!going) {
      if (message.role === "assistant") actions.push(["Regenerate", () => answer(path[place - 1])]);
      else actions.push(["Edit", () => edit(index)]);
      if (unanswered) actions.push(["Try again", () => tryAgain(index, path)]);
      const versions = versionsOf(conversation, index);
      const at = versions.indexOf(index);
      if (versions.length > 1) actions.unshift(versionSwitch(at, versions.length, (to) => {
        showVersion(versions[to]);
        const buttons = [...$("messages").children[place].querySelectorAll(".versions button:enabled")];
        buttons.at(to > at ? -1 : 0).focus();
      }));
    }
    const name = several && message.role === "assistant" && (names.get(message.model) ?? message.model);
    const notes = [message.note, unanswered && "not answered: the model does not read it", name, message.pace];
    return messageElement(message, actions, notes.filter((note) => typeof note === "string").join(" · "));
  });
  if (coming) elements.push(coming.element);
  // Elements that stay in place are not laid out again.
  elements.forEach((element, at) => {
    const there = $("messages").children[at];
    if (there !== element) $("messages").insertBefore(element, there ?? null);
  });
  while ($("messages").children.length > elements.length) $("messages").lastChild.remove();
  renderWaiting();
}

function showModelName() {
  const one = model();
  $("model-name").textContent = names.get(one?.id) ?? "";
  $("model-open").title = one?.id ?? "";
  const converses = one?.mlxchat.converses ?? true;
  $("input").placeholder = converses ? "Ask something" : "Write a text for the model to continue";
  $("empty-title").textContent = converses ? "What would you like to know?" : "What should the model continue?";
  $("empty-note").textContent = one ? `${names.get(one.id)} ${converses ? "answers" : "was only pretrained: it continues text"}.` : "";
  const prompts = one?.mlxchat.prompts ?? [];
  $("examples").replaceChildren(...(prompts.length ? prompts.map(shown) : converses ? EXAMPLES : BEGINNINGS).map(
    (text) => make("button", { type: "button", onclick: () => say(text) }, text)));
}

function complain(error, more = "") {
  $("problem").textContent = String(error?.message ?? error) + more;
  $("problem").hidden = false;
  if (error.status === 401 && !$("key-dialog").open) $("key-dialog").showModal();
}

function toEnd() {
  followed = true;
  $("scroll").scrollTop = $("scroll").scrollHeight;
}

// Only scrolling by the reader leaves the end; when text arrives or is rendered, the view follows it.
function scrolled() {
  const { scrollHeight, scrollTop, clientHeight } = $("scroll");
  if (scrollHeight - scrollTop - clientHeight < 60) followed = true;
  else if (scrollTop < scrolled.before) followed = false;
  scrolled.before = scrollTop;
  $("to-end").hidden = followed;
}

// ---- requests ----

function say(text, after = pathOf(conversation).at(-1) ?? -1) {
  if (going || !text.trim()) return;
  answer(append(conversation, { role: "user", parts: [{ type: "text", text }] }, after));
}

function tryAgain(index, path) {
  if (going) return;
  if (index === path.at(-1)) answer(index);
  else say(textOf(conversation.messages[index]), parentOf(conversation, index));
}

function showVersion(index) {
  if (going) return;
  editing = null;
  choose(conversation, index);
  $("problem").hidden = true;
  save(conversation);
  showAll();
}

function edit(index) {
  if (going) return;
  editing = index;
  showMessages();
}

function editElement(message, index) {
  const stop = () => { editing = null; showMessages(); $("input").focus(); };
  const { form, field } = editor(textOf(message), (text) => {
    editing = null;
    say(text, parentOf(conversation, index));
    $("input").focus();
  }, stop);
  setTimeout(() => { field.focus(); form.scrollIntoView({ block: "nearest" }); });
  return make("li", { class: "user" }, form);
}

function bodyFor(one, said) {
  const body = { model: one?.id, temperature: settings.temperature, top_k: settings.top_k, max_tokens: settings.max_tokens };
  if (settings.top_p < 1) body.top_p = settings.top_p;
  if (settings.min_p > 0) body.min_p = settings.min_p;
  if (settings.repetition_penalty !== 1) body.repetition_penalty = settings.repetition_penalty;
  if (settings.seed !== "") body.seed = Number(settings.seed);
  if (!one || one.mlxchat.converses) {
    const messages = said.map(({ role, parts }) => ({ role, content: role === "user" ? parts[0].text : parts }));
    const system = settings.system.trim() ? [{ role: "system", content: settings.system.trim() }] : [];
    return ["/v1/chat/completions", { ...body, messages: [...system, ...messages], truncation: "auto" }];
  }
  return ["/v1/completions", { ...body, prompt: textOf(said.at(-1)) }];
}

/** Request an answer to a message. It is added, and replaces the shown version, only once it has arrived. */
async function answer(parent) {
  if (going || parent === undefined) return;
  const one = model();
  const asked = conversation;
  const path = pathOf(asked, parent);
  const { messages, omitted } = readable(asked, path);
  const [address, body] = bodyFor(one, messages);
  const message = { role: "assistant", parts: [], model: one?.id ?? "", left_out: one?.mlxchat.converses === false ? 0 : omitted };
  const element = messageElement(message, []);
  const steps = slices(message);
  element.classList.add("going");
  element.setAttribute("aria-busy", "true");
  const controller = new AbortController();
  let kept = false;
  const keep = (note) => {
    if (kept) return;
    kept = true;
    if (note) message.note = note;
    asked.last = append(asked, message, parent);
    if (readConversations().some((other) => other.id === asked.id)) save(asked);
  };
  going = { asked, path, message, element, controller, keep };
  $("problem").hidden = true;
  busy(true);
  save(asked);
  showAll();
  toEnd();
  let pending = false;
  let cost = 0;
  const draw = () => {
    const before = performance.now();
    pending = false;
    element.querySelector(".left-out")?.remove();
    element.prepend(...omission(message.left_out));
    if (!steps.next().value) plan();
    cost = performance.now() - before;
  };
  const plan = () => {
    if (pending || going?.message !== message) return;
    pending = true;
    setTimeout(() => requestAnimationFrame(draw), 3 * cost); // rendering a large block takes at most a quarter of the time
  };
  let began = 0;
  let ended = 0;
  let failed = "";
  try {
    for await (const told of stream(address, body, controller.signal)) {
      if (told.finish_reason === "length") message.note = "ended at the longest length";
      if (told.truncated_turns) message.left_out += told.truncated_turns;
      if (told.usage && began) message.pace = pace(told.usage.completion_tokens, ended - began);
      if (told.text === undefined) continue;
      ended = performance.now();
      began ||= ended;
      const last = message.parts.at(-1);
      if (last?.type === told.type) last.text += told.text;
      else message.parts.push({ type: told.type, text: told.text });
      plan();
    }
  } catch (error) {
    failed = error.name === "AbortError" ? "stopped" : "cut off";
    if (error.name !== "AbortError") complain(error, versionKept(asked, parent));
  }
  going = null;
  renderWaiting(steps);
  busy(false);
  if (message.parts.length) keep(failed);
  else if (!failed) keep("said nothing");
  showAll();
  $("status").textContent = message.parts.length ? `The model said: ${shown(textOf(message).slice(0, 2000))}` : "No answer.";
}

function save(one) {
  if (!keepConversation(one)) complain(new Error("This browser's storage is full: the conversation is lost when you close this page."));
}

/** Return the index of an edited message without an answer; the version before it stays. */
function versionKept(asked, index) {
  if (pathOf(asked).includes(index)) return "";
  return ` The version before is shown; yours is kept as version ${versionsOf(asked, index).indexOf(index) + 1}.`;
}

function busy(yes) {
  const focused = document.activeElement === $("stop") || document.activeElement === $("send");
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  if (focused) $("input").focus();
}

function stop() {
  going?.controller.abort();
}

// ---- conversations ----

function open(one) {
  stop();
  conversation = one;
  editing = null;
  keepOpen(one.id);
  $("problem").hidden = true;
  showAll();
  toEnd();
  side(false);
  $("input").focus();
}

function begin() {
  open(fresh());
}

function openConversation(id) {
  const kept = readConversations().find((one) => one.id === id);
  if (!kept || id === conversation.id) return side(false);
  open(kept);
}

function side(shown) {
  $("side").classList.toggle("shown", shown);
  $("veil").hidden = !shown;
  $("side-open").setAttribute("aria-expanded", String(shown));
  if (shown) $("side-close").focus();
}

// ---- models and settings ----

async function loadModels() {
  try {
    models = await listModels();
    $("problem").hidden = true;
  } catch (error) {
    complain(error);
  }
  names = namesOf(models);
  $("model-choice").replaceChildren(...models.map(({ id }) => make("option", { value: id }, names.get(id))));
  showModelName();
}

async function showFacts() {
  const one = model();
  if (!one) return;
  $("model-choice").value = one.id;
  $("model-facts").replaceChildren(...provenance(one));
  const detail = await showModel(one.id).catch(() => null);
  if (detail && model()?.id === one.id) $("model-facts").replaceChildren(...provenance(one, detail));
}

function showSetting(key) {
  const [field, number] = [$(`set-${key}`), $(`out-${key}`)];
  if (field && field !== document.activeElement) field.value = settings[key];
  if (number) number.textContent = Number(settings[key]).toFixed(2);
}

function changeSetting(key, field) {
  const numeric = typeof DEFAULTS[key] === "number";
  if (!field.checkValidity() || (numeric && field.value === "")) return;
  settings[key] = numeric ? Number(field.value) : field.value;
  writeSettings(settings);
  showSetting(key);
  theme();
}

function theme() {
  document.documentElement.dataset.theme = settings.theme;
}

// ---- event handlers ----

function fit() {
  const field = $("input");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

function submit(event) {
  event.preventDefault();
  if (going) return;
  const text = $("input").value.trim();
  if (!text) return;
  $("input").value = "";
  fit();
  say(text);
}

$("form").addEventListener("submit", submit);
$("input").addEventListener("input", fit);
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
});
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", begin);
$("side-open").addEventListener("click", () => side(true));
$("side-close").addEventListener("click", () => { side(false); $("side-open").focus(); });
$("veil").addEventListener("click", () => side(false));
$("model-open").addEventListener("click", () => { $("model-dialog").showModal(); showFacts(); });
$("model-choice").addEventListener("change", (event) => {
  settings.model = event.target.value;
  writeSettings(settings);
  showModelName();
  showFacts();
});
$("settings-open").addEventListener("click", () => { Object.keys(DEFAULTS).forEach(showSetting); $("settings-dialog").showModal(); });
for (const key of Object.keys(DEFAULTS)) $(`set-${key}`)?.addEventListener("input", (event) => changeSetting(key, event.target));
$("forget").addEventListener("click", () => {
  const count = readConversations().length;
  if (!count || !window.confirm(`Delete all ${count} conversations?`)) return;
  dropAll();
  $("settings-dialog").close();
  begin();
});
$("scroll").addEventListener("scroll", scrolled, { passive: true });
new ResizeObserver(() => { if (followed) toEnd(); else scrolled(); }).observe($("messages"));
$("to-end").addEventListener("click", () => { toEnd(); $("input").focus(); });
$("messages").addEventListener("click", ({ target }) => {
  if (target.matches("figure .copy")) copy(target.closest("figure").querySelector("code").textContent, target);
});
$("key-form").addEventListener("submit", () => { setKey($("key").value.trim()); $("key").value = ""; loadModels(); });
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.querySelector("[data-close]")?.addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (going) stop();
    else side(false);
  }
  if (event.ctrlKey && event.shiftKey && event.code === "KeyO") { event.preventDefault(); begin(); }
});
window.addEventListener("storage", showList);
window.addEventListener("pagehide", () => { if (going?.message.parts.length) going.keep("cut off"); });

theme();
open(readConversations().find(({ id }) => id === readOpen()) ?? conversation);
loadModels();
