"""The grids of released formats, one function each: INT4 in groups of 32 and FP8 in blocks of 128 x 128, in plain PyTorch, with
Triton versions that are equal bit for bit. Loader, trainer, exporter and serving checks all call these."""
