"""Data: from users' files (or the running Python's own documentation) to counted shards and one global order of documents.

`records` says what a record is; `sources/` yields them; `filtering` runs `filters/` and keeps the funnel; `shards` is the format
on disk (records and tokens, checked exactly); `mixture` weighs domains into an epoch's order; `pack` and `feed` make batches of
them; `ngram` gives the baselines. No torch.
"""
