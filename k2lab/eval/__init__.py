"""Measuring models: bits per byte of held-out documents, loss on held-out responses, task scores, and honest intervals.

`bits` and `response` score text with a model, `tasks` runs tasks with a sampler, `stats` turns per-item values into estimates
with 95 % intervals and paired changes, and `results` assembles them into results.json, which the report reads.
"""
