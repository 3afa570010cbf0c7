// A conversation is a tree of messages. `messages` is only ever appended to; `parent` of a message is the index of the
// one before it (-1: none; absent: the previous index), and messages with one parent are versions of each other.
// `last` is the index at which the shown path ends, so a new version replaces another only when `last` moves to it.

// Size as JSON: the server refuses bodies above 1 MB.
const MOST_CHARACTERS = 150_000;

export function fresh() {
  return { id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, changed: Date.now(), messages: [], last: -1 };
}

export function parentOf({ messages }, index) {
  return messages[index].parent ?? index - 1;
}

/** Return the indices of the messages up to `end`, first to last. */
export function pathOf(conversation, end = conversation.last ?? conversation.messages.length - 1) {
  const path = [];
  for (let at = end; at >= 0; at = parentOf(conversation, at)) path.push(at);
  return path.reverse();
}

/** Add a message after `parent` and return its index. The shown path continues with it if it ended at `parent`. */
export function append(conversation, message, parent) {
  const ended = pathOf(conversation).at(-1) ?? -1;
  const index = conversation.messages.push(Object.assign(message, { parent })) - 1;
  conversation.last = ended === parent ? index : ended;
  return index;
}

/** Return the indices of all versions of a message, oldest first. */
export function versionsOf(conversation, index) {
  const parent = parentOf(conversation, index);
  return [...conversation.messages.keys()].filter((other) => parentOf(conversation, other) === parent);
}

/** Show a version of a message, with the latest messages after it. */
export function choose(conversation, index) {
  const below = new Set([index]);
  for (let at = index + 1; at < conversation.messages.length; at += 1) {
    if (below.has(parentOf(conversation, at))) below.add(at);
  }
  conversation.last = Math.max(...below);
}

/** Return true if the message at this place of a path has no answer although the path continues. */
export function isUnanswered({ messages }, path, place) {
  return messages[path[place]].role === "user" && messages[path[place + 1]]?.role !== "assistant";
}

/**
 * Return what the model reads for an answer to the end of a path: {messages, omitted}. Messages that were never
 * answered are left out, and of a very long conversation the oldest turns, whose number is `omitted`.
 */
export function readable(conversation, path) {
  const said = path.filter((_, place) => place === path.length - 1 || !isUnanswered(conversation, path, place))
    .map((index) => conversation.messages[index]);
  let begin = said.length - 1;
  let characters = 0;
  for (let at = begin; at >= 0; at -= 1) {
    characters += JSON.stringify(said[at].parts).length;
    if (characters > MOST_CHARACTERS) break;
    if (said[at].role === "user") begin = at;
  }
  const omitted = said.slice(0, begin).filter((message) => message.role === "user").length;
  return { messages: said.slice(begin), omitted };
}
