"""transformers' model classes with our hot parts: packed attention with exact per-head maximum logits, grouped experts, Kimi
Delta Attention and its short convolution with document boundaries, router bias, chunked losses.

`build.from_spec`, `build.load` and `build.save` give and take a `wrap.TrainModel`, which the trainer sees as `core.types.Model`;
its `.hf` is an ordinary transformers model that decodes with transformers' caches.
"""
