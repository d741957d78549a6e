"""Where completions come from: a local sampler on the model's own weights, a scripted fake, and an asynchronous front.

Every sampler turns prompts of token ids into `core.types.Completion`s: the tokens that the model produced (never decoded and
tokenised again), their log-probabilities under the untempered distribution, and why generation ended. A draw depends only on
(seed, request key, position), never on which other requests share the batch.
"""
