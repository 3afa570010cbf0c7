// Conversations and settings, kept in this browser only.

const CONVERSATIONS = "mlxchat.conversations";
const SETTINGS = "mlxchat.settings";
const OPEN = "mlxchat.open";
const MOST = 200;

export const DEFAULTS = { temperature: 0.8, top_k: 50, top_p: 1, min_p: 0, repetition_penalty: 1, max_tokens: 512, seed: "", system: "", theme: "", model: "" };

function read(key, fallback) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? fallback;
  } catch {
    return fallback;
  }
}

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

/** Return the settings; numeric ones are numbers, whatever was stored. */
export function readSettings() {
  const kept = read(SETTINGS, {});
  const settings = { ...DEFAULTS };
  for (const [key, usual] of Object.entries(DEFAULTS)) {
    if (typeof kept?.[key] === typeof usual && !Number.isNaN(kept[key])) settings[key] = kept[key];
  }
  return settings;
}

/** Return the conversation that is open in this tab; a reload opens it again. */
export function readOpen() {
  return sessionStorage.getItem(OPEN);
}

export function keepOpen(id) {
  sessionStorage.setItem(OPEN, id);
}

export function writeSettings(settings) {
  write(SETTINGS, settings);
}

/** Return conversations, the latest first: {id, changed, last, messages: [{role, parts: [{type, text}], parent, model}]}. */
export function readConversations() {
  const kept = read(CONVERSATIONS, []);
  const whole = (one) => typeof one?.id === "string" && Number.isFinite(one.changed)
    && Array.isArray(one.messages) && one.messages.every(isMessage)
    && (one.last === undefined || isIndex(one.last, one.messages.length));
  return Array.isArray(kept) ? kept.filter(whole).sort((a, b) => b.changed - a.changed) : [];
}

function isIndex(value, end) {
  return Number.isInteger(value) && value >= -1 && value < end;
}

function isMessage(message, index) {
  return ["user", "assistant"].includes(message?.role) && Array.isArray(message.parts)
    && (message.parent === undefined || isIndex(message.parent, index))
    && (message.role !== "user" || message.parts.length > 0) && message.parts.every((part) => typeof part?.type === "string" && typeof part.text === "string");
}

/** Store a conversation, deleting the oldest ones if storage is full; return true if it fits. Other tabs write too. */
export function keepConversation(conversation) {
  conversation.changed = Date.now();
  let all = [conversation, ...readConversations().filter((one) => one.id !== conversation.id)].slice(0, MOST);
  while (all.length > 1 && !write(CONVERSATIONS, all)) all = all.slice(0, -1);
  return all.length > 1 || write(CONVERSATIONS, all);
}

export function dropConversation(id) {
  write(CONVERSATIONS, readConversations().filter((one) => one.id !== id));
}

export function dropAll() {
  write(CONVERSATIONS, []);
}
