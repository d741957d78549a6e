"""One run directory becomes one self-contained HTML file and one table. Reads files only: no torch, no network, nothing that
is not in the run directory, so that every number on the page can be recomputed from it."""
