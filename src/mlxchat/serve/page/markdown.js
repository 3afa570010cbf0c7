// Markdown to DOM nodes. Text only ever becomes textContent, so nothing in it can become markup or script.

// The text of a model is rendered again in each frame, so the time must be linear in its length: an unbounded
// quantifier stands alone in its expression, anchored at the beginning.
const FENCE = /^ {0,3}(`{3}|~{3})/;
const HEADING = /^ {0,3}(#{1,6})\s/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s/;
const SAFE_LINK = /^(https?:\/\/|mailto:)/i;
const DEEPEST = 8;
// Of a table. Browsers lay out rows × columns, also where rows have few cells; what is beyond goes into the last column.
const MOST_COLUMNS = 50;
// What turns the direction of a text around, so that it is read otherwise than it is: of links, names, code.
const TURNING = /[\u202a-\u202e\u2066-\u2069]/g;

// Marks on one character, beyond those of any script: a browser takes time in the square of their number to lay them out.
const MARKS = /([\p{M}\p{Cf}\p{Emoji_Modifier}\uff9e\uff9f]{16})[\p{M}\p{Cf}\p{Emoji_Modifier}\uff9e\uff9f]{1,9999}/gu;

/** Return a text as it is shown: nothing in it makes what stands around it read otherwise, or stops the page. */
export function shown(text) {
  return text.replace(TURNING, "\ufffd").replace(MARKS, "$1…");
}

/** Return an element with children: nodes, text, and lists of them (a call with 100,000 arguments overflows the stack). */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") element.className = value;
    else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value);
  }
  for (const child of children.flat()) element.append(child);
  return element;
}

/** Replace an element's children by nodes, however many there are. */
export function fill(element, nodes) {
  element.replaceChildren();
  for (const node of nodes) element.append(node);
}

/** Return the nodes of a text; `copy(text, button)` is what a code block's button does. */
export function renderMarkdown(text, copy, depth = 0) {
  const lines = shown(text).split("\n");
  const nodes = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    let match;
    if (!line.trim()) at += 1;
    else if ((match = FENCE.exec(line))) {
      const fence = leading(line.trimStart(), match[1][0]);
      const language = /^[\w+#.-]*/.exec(line.trimStart().slice(fence.length).trimStart())[0];
      const body = [];
      for (at += 1; at < lines.length && !closes(lines[at], fence); at += 1) body.push(lines[at]);
      at += 1;
      nodes.push(codeBlock(body.join("\n"), language, copy));
    } else if ((match = HEADING.exec(line))) {
      nodes.push(make(`h${Math.min(5, match[1].length + 1)}`, {}, renderInline(headingText(line.slice(match[0].length)))));
      at += 1;
    } else if (isRule(line)) {
      nodes.push(make("hr"));
      at += 1;
    } else if (/^ {0,3}>/.test(line) && depth < DEEPEST) {
      const body = [];
      for (; at < lines.length && /^ {0,3}>/.test(lines[at]); at += 1) body.push(lines[at].replace(/^ {0,3}> ?/, ""));
      nodes.push(make("blockquote", {}, renderMarkdown(body.join("\n"), copy, depth + 1)));
    } else if (ITEM.test(line) && depth < DEEPEST) {
      const end = endOfList(lines, at);
      nodes.push(list(lines.slice(at, end), copy, depth));
      at = end;
    } else if (line.includes("|") && at + 1 < lines.length && isDivider(lines[at + 1])) {
      const rows = [line, lines[at + 1]];
      for (at += 2; at < lines.length && lines[at].includes("|"); at += 1) rows.push(lines[at]);
      nodes.push(table(rows));
    } else {
      const body = [line];
      for (at += 1; at < lines.length && lines[at].trim() && !begins(lines[at]); at += 1) body.push(lines[at]);
      nodes.push(make("p", {}, withBreaks(body)));
    }
  }
  return nodes;
}

/** Return the nodes of a line: code, bold, italic, struck, links. */
export function renderInline(text, depth = 0) {
  const nodes = [];
  const unclosed = new Set(); // marks that nothing further on closes: looked for once, not again at each of them
  let plain = "";
  const flush = () => { if (plain) nodes.push(plain); plain = ""; };
  let at = 0;
  while (at < text.length) {
    const char = text[at];
    if (char === "\\" && /[\\`*_~[\]()#!|]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
      continue;
    }
    const found = char === "`" ? code(text, at) : "*_~".includes(char) && depth < DEEPEST ? stressed(text, at, depth, unclosed)
      : char === "[" || (char === "!" && text[at + 1] === "[") ? link(text, at, depth) : null;
    if (found) {
      flush();
      nodes.push(found.node);
      at = found.end;
    } else {
      plain += char;
      at += 1;
    }
  }
  flush();
  return nodes;
}

function begins(line) {
  return FENCE.test(line) || HEADING.test(line) || isRule(line) || ITEM.test(line) || /^ {0,3}>/.test(line);
}

function leading(text, char) {
  let end = 0;
  while (text[end] === char) end += 1;
  return text.slice(0, end);
}

function closes(line, fence) {
  const bare = line.trim();
  return bare.length >= fence.length && bare === leading(bare, fence[0]);
}

// Hashes at the end close a heading only after a space: "# C#" keeps its own.
function headingText(text) {
  const bare = text.trim();
  let end = bare.length;
  while (bare[end - 1] === "#") end -= 1;
  return end === 0 || /\s/.test(bare[end - 1]) ? bare.slice(0, end).trimEnd() : bare;
}

function isRule(line) {
  if (!/^ {0,3}[-*_]/.test(line)) return false;
  const bare = line.replace(/\s/g, "");
  return bare.length > 2 && bare === leading(bare, bare[0]);
}

function isDivider(line) {
  const marks = cells(line);
  return marks.length > 1 && marks.every((mark) => /^:?-+:?$/.test(mark));
}

function cells(row) {
  return row.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

function withBreaks(lines) {
  return lines.flatMap((line, index) => [...(index ? [make("br")] : []), ...renderInline(line.trim())]);
}

function codeBlock(text, language, copy) {
  const button = make("button", { type: "button" }, "Copy");
  button.addEventListener("click", () => copy(text, button));
  return make("figure", { class: "code" }, make("figcaption", {}, make("span", {}, language || "code"), button),
    make("pre", { tabindex: "0", role: "region", "aria-label": "Code" }, make("code", {}, text)));
}

function endOfList(lines, at) {
  const indent = ITEM.exec(lines[at])[1].length;
  let end = at + 1;
  while (end < lines.length) {
    const line = lines[end];
    const next = lines[end + 1] ?? "";
    const goesOn = line.trim() ? ITEM.test(line) || /^\s/.test(line) : (ITEM.test(next) || /^\s{2,}\S/.test(next));
    if (!goesOn || (isRule(line) && line.search(/\S/) <= indent)) break;
    end += 1;
  }
  return end;
}

function list(lines, copy, depth) {
  const first = ITEM.exec(lines[0]);
  const ordered = /\d/.test(first[2]);
  const items = [];
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (match && match[1].length <= first[1].length + 1) items.push([line.slice(match[0].length).trimStart()]);
    else items.at(-1).push(line.replace(/^\s{1,4}/, ""));
  }
  const made = make(ordered ? "ol" : "ul", ordered ? { start: String(parseInt(first[2], 10)) } : {});
  for (const item of items) {
    const nodes = item.length === 1 ? renderInline(item[0])
      : [...renderInline(item[0]), ...renderMarkdown(item.slice(1).join("\n"), copy, depth + 1)];
    made.append(make("li", {}, nodes));
  }
  return made;
}

function table(rows) {
  const [head, divider, ...body] = rows.map(cells);
  const columns = Math.min(MOST_COLUMNS, Math.max(head.length, divider.length));
  const side = divider.map((mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "centre" : "right") : ""));
  const line = (name, extra) => (row) => {
    const texts = row.length > columns ? [...row.slice(0, columns - 1), row.slice(columns - 1).join(" | ")] : row;
    const made = texts.map((text, at) => make(name, { ...(side[at] ? { class: side[at] } : {}), ...extra }, renderInline(text)));
    const missing = columns - texts.length;
    return make("tr", {}, made, missing ? make("td", { colspan: String(missing) }) : []);
  };
  return make("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": "Table" },
    make("table", {}, make("thead", {}, line("th", { scope: "col" })(head)), make("tbody", {}, body.map(line("td", {})))));
}

function code(text, at) {
  const ticks = /^`+/.exec(text.slice(at, at + 20))[0];
  const end = text.indexOf(ticks, at + ticks.length);
  if (end < 0) return null;
  return { node: make("code", {}, text.slice(at + ticks.length, end)), end: end + ticks.length };
}

function stressed(text, at, depth, unclosed) {
  const char = text[at];
  const double = text[at + 1] === char;
  if (char === "~" && !double) return null;
  const mark = double ? char + char : char;
  if (unclosed.has(mark)) return null;
  const begin = at + mark.length;
  if (/\s/.test(text[begin] ?? " ")) return null;
  if (char === "_" && /\w/.test(text[at - 1] ?? " ")) return null;
  let end = text.indexOf(mark, begin + 1);
  while (end > 0 && (/\s/.test(text[end - 1]) || (char === "_" && /\w/.test(text[end + mark.length] ?? " ")))) {
    end = text.indexOf(mark, end + 1);
  }
  if (end < 0) {
    unclosed.add(mark);
    return null;
  }
  const name = char === "~" ? "del" : double ? "strong" : "em";
  return { node: make(name, {}, renderInline(text.slice(begin, end), depth + 1)), end: end + mark.length };
}

function link(text, at, depth) {
  const match = /^!?\[([^\][]{0,500})\]\(\s{0,20}([^\s()]{1,2000}(?:\([^\s()]{0,500}\))?)(?:\s{1,20}"[^"]{0,200}")?\s{0,20}\)/.exec(text.slice(at, at + 3000));
  if (!match || !SAFE_LINK.test(match[2]) || depth >= DEEPEST) return null;
  const attributes = { href: match[2], title: match[2], target: "_blank", rel: "noopener noreferrer nofollow" };
  return { node: make("a", attributes, match[1] || match[2]), end: at + match[0].length };
}
