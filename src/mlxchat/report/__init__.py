"""The report of a run: report.md, report.html and pictures, nanochat's report card and more.

`collect` reads a run into a `RunReport`, of which `tables`, `plots`, `examples` and `summary` (the four answers) make
the parts of a `document`: Markdown and one page. `comparison` and `experiments` are of several runs, `card` of an
export. Every number comes from a manifest, metrics.jsonl or scores.json, so a report can be written again at any time
(nanochat parses its own Markdown).
"""
