"""Tool slots: each a frozen dataclass with `spec() -> dict` (an OpenAI-style tool specification) and `call(arguments_json) ->
str`.

What a model does wrong is a text that tells it so; `call` raises only if the tool itself cannot work.
"""
