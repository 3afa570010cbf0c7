// What the page asks of its server.

const KEY = "mlxchat.key";

/** An error body of the server, or the lack of an answer. */
export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
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
  const message = body?.error?.message ?? `The server answers ${response.status}.`;
  throw new Refused(wait ? `${message}. Try again in ${wait} s.` : message, response.status);
}

export async function listModels() {
  return (await (await ask("/v1/models")).json()).data;
}

export async function showModel(id) {
  return (await ask(`/v1/models/${encodeURIComponent(id)}`)).json();
}

/** Yield {type, text} of an answer as it comes, then {finish_reason} and {usage}. */
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
      if (told.error) throw new Refused(told.error.message, 500);
      if (told.usage) yield { usage: told.usage };
      const choice = told.choices?.[0];
      if (!choice) continue;
      if (choice.text) yield { type: "text", text: choice.text };
      if (choice.delta?.content) yield { type: "text", text: choice.delta.content };
      if (choice.delta?.part) yield choice.delta.part;
      if (choice.finish_reason) yield { finish_reason: choice.finish_reason };
    }
  }
  throw new Refused("The answer was cut off: the server has stopped.", 0);
}
