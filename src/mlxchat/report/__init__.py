"""The report of a run: report.md, report.html and pictures, nanochat's report card and more.

    collect      run folder and store → RunReport                           (standard library only)
    tables       RunReport → tables, free of any format; what is published of the same recipe (published.json)
    examples     what the model wrote
    summary      did it learn, how well, what did it cost, what next; the console
    plots        RunReport → charts → SVG                                   (matplotlib)
    document     all of it → Markdown → one page                            (markdown-it, page.css)
    comparison   several runs side by side, and how they scale
    card         the model card of an export

What evaluations measured has one schema, in evals/scores.py. Where nanochat finds numbers again by searching its own
Markdown, here every number comes from a manifest, metrics.jsonl or scores.json, so that a report can be written again
at any time.
"""
