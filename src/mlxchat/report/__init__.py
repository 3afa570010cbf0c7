"""The report of a run: report.md, report.html and pictures, nanochat's report card and more.

    collect      run folder and store → RunReport                           (standard library only)
    tables       RunReport → tables
    examples     answers and samples of the model
    summary      did it learn, how well, what did it cost, what next; the console
    plots        RunReport → charts → SVG                                   (matplotlib)
    document     all of it → Markdown → one page                            (markdown-it, page.css)
    comparison   several runs side by side, and how they scale
    card         the model card of an export

The schema of scores is in evals/scores.py. Every number comes from a manifest, metrics.jsonl or scores.json, so a
report can be written again at any time (nanochat parses its own Markdown).
"""
