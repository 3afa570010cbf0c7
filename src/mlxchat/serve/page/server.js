// Requests of the page to its server.

const KEY = "mlxchat.key";

/** An error message for the reader; `status` is 0 if there was no response. */
export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

// The server's error messages are for programs: they name fields, headers and codes.
function refusal(status, { message = "", param, code } = {}, wait = null) {
  const sentence = message && `${message[0].toUpperCase()}${message.slice(1)}${/[.!?]$/.test(message) ? "" : "."}`;
  const words = () => {
    if (status === 401) return "This server needs an API key.";
    if (status === 403) return "This server refuses requests from this page's address.";
    if (status === 413) return "This conversation is too large for the server. Begin a new one.";
    if (status === 429) return `The server is busy with other answers. Try again in ${wait ?? "a few"} s.`;
    if (status === 503) return `The server is starting or stopping. Try again in ${wait ?? "a few"} s.`;
    if (status >= 500) return `The server failed while it answered. Try again. ${sentence}`;
    if (code === "model_not_found") return "The server no longer has this model. Choose another one at the top.";
    if (code === "unsupported_model") return "This is a base model, which cannot chat. Choose another one at the top.";
    if (["messages", "prompt"].includes(param)) return sentence;
    if (param) return `The server does not accept a setting: ${sentence} Change it in Settings.`;
    return `The server refused: ${sentence || `status ${status}.`}`;
  };
  return new Refused(words().trim(), status);
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer. Is mlxchat serve still running?", 0);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const wait = response.headers.get("Retry-After");
  throw refusal(response.status, body?.error, wait);
}

/** Return the server's answer to a GET request. */
export async function readJson(path) {
  return (await ask(path)).json();
}

export async function listModels() {
  return (await readJson("/v1/models")).data;
}

export async function showModel(id) {
  return readJson(`/v1/models/${encodeURIComponent(id)}`);
}

/** Yield {truncated_turns} and {type, text} of an answer as they arrive, then {finish_reason} and {usage}. */
export async function* stream(path, body, signal) {
  const response = await ask(path, {
    method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    waiting += value;
    const lines = waiting.split("\n");
    waiting = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const told = JSON.parse(data);
      if (told.error) throw refusal(told.error.type === "server_error" ? 500 : 400, told.error);
      if (told.usage) yield { usage: told.usage };
      if (told.mlxchat?.truncated_turns) yield { truncated_turns: told.mlxchat.truncated_turns };
      const choice = told.choices?.[0];
      if (!choice) continue;
      if (choice.text) yield { type: "text", text: choice.text };
      if (choice.delta?.content) yield { type: "text", text: choice.delta.content };
      if (choice.delta?.part) yield choice.delta.part;
      if (choice.finish_reason) yield { finish_reason: choice.finish_reason };
    }
  }
  throw new Refused("The answer was cut off: the connection to the server ended.", 0);
}
