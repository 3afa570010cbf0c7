// Renders a model's Markdown: markdown-it parses it, DOMPurify allows elements by name, and only code of this page sets
// handlers. When text grows, only its last block is rendered again.

import "./vendor/markdown-it.min.js";
import "./vendor/purify.min.js";

const { markdownit, DOMPurify } = globalThis;

// Browsers lay out rows × columns even if rows have few cells; wider tables stay text.
const MOST_COLUMNS = 50;
// nanochat's "#### 42" marks the answer of a calculation; it is not a heading.
const ANSWER = /^[-+]?\$?[\d.,]+%?$/;
const ADDRESS = /^(https?:\/\/|mailto:)/i;
// Bidirectional overrides, which change the order in which text is shown.
const TURNING = /[\u202a-\u202e\u2066-\u2069]/g;
// More combining marks on one character than any script has; layout time is quadratic in their number.
const MARKS = /([\p{M}\p{Cf}\p{Emoji_Modifier}\uff9e\uff9f]{16})[\p{M}\p{Cf}\p{Emoji_Modifier}\uff9e\uff9f]{1,9999}/gu;

/** Return a text without bidirectional overrides and excess combining marks. */
export function shown(text) {
  return text.replace(TURNING, "\ufffd").replace(MARKS, "$1…");
}

// A link definition would change text before it.
const md = markdownit({ breaks: true }).disable("reference");
md.validateLink = (address) => ADDRESS.test(address);

const [table] = md.block.ruler.getRules("");
const narrow = (state, line, end, silent) => {
  if (line + 1 >= end) return false;
  const divider = state.src.slice(state.bMarks[line + 1], state.eMarks[line + 1]);
  return divider.split("|").length <= MOST_COLUMNS && table(state, line, end, silent);
};
md.block.ruler.at("table", narrow, { alt: ["paragraph", "reference"] });

// Only the page has an h1, its policy forbids inline styles, and answers of calculations become paragraphs.
md.core.ruler.after("block", "page", ({ tokens }) => {
  tokens.forEach((token, at) => {
    const align = token.attrGet("style")?.slice("text-align:".length);
    if (align) token.attrs = [["class", align]];
    if (["fence", "code_block"].includes(token.type)) token.content = token.content.replace(/\n$/, "");
    if (token.type !== "heading_open") return;
    const [text, close] = [tokens[at + 1], tokens[at + 2]];
    const isAnswer = token.markup === "####" && ANSWER.test(text.content);
    token.tag = close.tag = isAnswer ? "p" : `h${Math.min(5, Number(token.tag[1]) + 1)}`;
    if (isAnswer) text.content = `Answer: **${text.content}**`;
  });
});
// Images become links, so that a model's text loads nothing.
md.renderer.rules.image = (tokens, at) => {
  const { escapeHtml } = md.utils;
  return `<a href="${escapeHtml(tokens[at].attrGet("src"))}">${escapeHtml(tokens[at].content)}</a>`;
};

/** Return the tokens of a text. */
function parse(text) {
  return md.parse(text, {});
}

/** Return tokens as HTML, before DOMPurify. */
function written(tokens) {
  return shown(md.renderer.render(tokens, md.options, {}));
}

/** Return a text as HTML, before DOMPurify. */
export function html(text) {
  return written(parse(text));
}

const ADMITTED = {
  ALLOWED_TAGS: ["a", "blockquote", "br", "code", "em", "h2", "h3", "h4", "h5", "hr", "li", "ol", "p", "pre", "s", "strong",
    "table", "tbody", "td", "th", "thead", "tr", "ul"],
  ALLOWED_ATTR: ["class", "href", "start"],
  ALLOWED_URI_REGEXP: ADDRESS,
  RETURN_DOM_FRAGMENT: true,
};

/** Return an element with children: nodes, text, and lists of them. */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value);
  }
  for (const child of children.flat()) element.append(child);
  return element;
}

function elements(tokens) {
  const fragment = DOMPurify.sanitize(written(tokens), ADMITTED);
  for (const link of fragment.querySelectorAll("a")) {
    const address = link.getAttribute("href");
    if (!link.textContent.trim()) link.textContent = address;
    link.title = address;
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const pre of fragment.querySelectorAll("pre")) {
    const language = /^language-([\w+#.-]{1,40})/.exec(pre.firstChild.className)?.[1] ?? "code";
    const figure = make("figure", { class: "code" },
      make("figcaption", {}, make("span", {}, language), make("button", { type: "button", class: "copy" }, "Copy")));
    pre.replaceWith(figure);
    figure.append(scrolling(pre, "Code"));
  }
  for (const one of fragment.querySelectorAll("table")) {
    const place = make("div", { class: "scroller" });
    one.replaceWith(place);
    scrolling(place, "Table").append(one);
  }
  return fragment;
}

/** Make an element focusable and scrollable by keyboard; return it. */
export function scrolling(element, name) {
  for (const [key, value] of Object.entries({ tabindex: "0", role: "region", "aria-label": name })) element.setAttribute(key, value);
  return element;
}

/**
 * Return a function that shows a text in an element, each time a longer one; it returns the number of characters whose
 * elements stay. A block stays once the next one has a whole line.
 */
export function growing(element) {
  let kept = 0;
  let open = [];
  return (text, finish = () => {}) => {
    const rest = text.replaceAll("\r\n", "\n").replaceAll("\r", "\n").slice(kept);
    const tokens = parse(rest);
    const wholeLines = rest.split("\n").length - 1;
    const begins = (token) => token.level === 0 && token.nesting >= 0 && token.map?.[0] < wholeLines;
    const last = Math.max(0, tokens.findLastIndex(begins));
    for (const node of open) node.remove();
    const add = (some) => {
      const fragment = elements(some);
      finish(fragment);
      open = [...fragment.childNodes];
      element.append(fragment);
    };
    if (last > 0) {
      add(tokens.slice(0, last));
      kept += rest.split("\n", tokens[last].map[0]).join("\n").length + 1;
    }
    add(tokens.slice(last));
    return kept;
  };
}
