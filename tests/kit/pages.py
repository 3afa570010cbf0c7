"""What is measured of a page in a browser."""

from typing import Any

# Of every text that is shown: its own colour against the first ground behind it.
_CONTRASTS = """() => {
  const channel = v => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const parse = s => (s.match(/[\\d.]+/g) || []).map(Number);
  const found = [];
  const texts = 'h1, h2, h3, p, th, td, small, dt, dd, li, a, pre, code, span, summary, text, button, strong, textarea';
  for (const e of document.querySelectorAll(texts)) {
    if (!e.textContent.trim() || !e.getClientRects().length) continue;
    const style = getComputedStyle(e), own = parse(e.tagName === 'text' ? style.fill : style.color);
    let ground = null;
    for (let up = e; up && !ground; up = up.parentElement) {
      const c = parse(getComputedStyle(up).backgroundColor);
      if (c.length === 3 || c[3] === 1) ground = c;
    }
    const [a, b] = [light(own), light(ground || [255, 255, 255])].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), e.outerHTML.slice(0, 80)]);
  }
  return found.sort((x, y) => x[0] - y[0])[0];
}"""


def weakest_contrast(page: Any) -> tuple[float, str]:
    """Return the least contrast of a text as WCAG defines it, and its element; AA asks for 4.5."""
    ratio, element = page.evaluate(_CONTRASTS)
    return ratio, element
