"""Turning a foreign model into a checkpoint of ours: weights, tokenizer, and Kimi's chat tokens where they are missing.

Legend: `W` vocabulary, `D` width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from k2lab.core.artifacts import write_json
from k2lab.text import layout

# What the new tokens of a turn's head begin like: a newline, so that `<|im_end|><|im_assistant|>assistant<|im_middle|>` looks
# like `<|im_end|>\nassistant\n` to a model that was trained on ChatML. There a newline follows the turn's end, and by that such a
# model goes: its `<|im_start|>` and `<|im_end|>` may be almost one vector, and right behind an `<|im_end|>` it ends the next turn
# at once. They begin shorter: what a token means lies in the direction, since layers normalise, while a head tied to the
# embedding would otherwise say the new token as readily as the old one.
NEWLINE = "\n"
SHORTER = 0.5
LIKE_NEWLINE = (layout.IM_USER, layout.IM_ASSISTANT, layout.IM_SYSTEM, layout.IM_MIDDLE)


def import_gguf(path: Path, work: Path, chat_tokens: bool, dtype: Any = None) -> dict[str, Any]:
    """Writes the model of a GGUF file into `work` as safetensors of `dtype` (fp32 if None), with tokenizer; facts about it."""
    import torch

    from k2lab.ckpt import gguf

    dtype = dtype or torch.float32
    file = gguf.GgufFile(path)
    config = gguf.config_of(file)
    spec, settings = gguf.tokenizer_of(file)
    state = {name: torch.from_numpy(value).to(dtype) for name, value in gguf.state_of(file, config)}
    facts = {"format": "gguf", "quantised": sorted({entry.type for entry in file.tensors.values()})}
    facts["license_in_file"] = file.metadata.get("general.license", "")
    return {**facts, **_finish(state, config, spec, settings, work, chat_tokens, dtype)}


def import_folder(path: Path, work: Path, chat_tokens: bool, dtype: Any = None) -> dict[str, Any]:
    """As `import_gguf`, for a model directory with config.json, safetensors (quantised or not) and tokenizer.json. What training
    leaves alone of a quantised one is later exported from its own bytes, which `origin.json` names."""
    import torch

    from k2lab.ckpt import origin
    from k2lab.ckpt.folder import open_folder
    from k2lab.core.errors import CheckpointError
    from k2lab.models import build

    dtype = dtype or torch.float32
    for name in ("config.json", "tokenizer.json"):
        if not (path / name).is_file():
            raise CheckpointError(f"{path} holds no {name}", allowed="config.json, safetensors and tokenizer.json")
    with open_folder(path) as source:
        model = build.load(source, dtype=dtype)
    spec = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    settings = {}
    if (path / "tokenizer_config.json").is_file():
        settings = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    facts = _finish(dict(model.state()), model.spec.config(), spec, settings, work, chat_tokens, dtype)
    origin.carry(path, work)
    quantised = {"quantised": [source.format]} if source.format in ("fp8_block", "int4_group") else {}
    return {"format": "safetensors", **quantised, **facts}


def _finish(
    state: dict[str, Any],
    config: dict[str, Any],
    spec: dict[str, Any],
    settings: dict[str, Any],
    work: Path,
    chat: bool,
    dtype: Any,
) -> dict[str, Any]:
    """Adds chat tokens, builds the model with these weights and saves it with its tokenizer."""
    from k2lab.core.errors import CheckpointError
    from k2lab.models import build
    from k2lab.specs import ModelSpec
    from k2lab.text import tokenizer as text_tokenizer
    from k2lab.text.template import chat_template

    added = add_chat_tokens(spec, settings, state, config) if chat else []
    write_json(work / "tokenizer.json", spec)
    write_json(work / "tokenizer_config.json", settings)
    tokenizer = text_tokenizer.load(work)
    tokenizer.save(work, chat_template=chat_template(default_system=False) if chat else None)
    shape = ModelSpec.from_config(config)
    model = build.from_spec(shape, seed=0, dtype=dtype)
    own = model.state()
    if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
        odd = sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]
        raise CheckpointError("the file's tensors are not those of its shape", got=", ".join(odd[:5]))
    model.load_state(state)
    build.save(model, work)
    return {"parameters": shape.total(), "added_tokens": added, "vocab_size": shape.vocab_size}


def add_chat_tokens(spec: dict[str, Any], settings: dict[str, Any], state: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Adds those of Kimi's chat tokens that the vocabulary lacks to a tokenizer.json, and rows for them to embedding and head.

    A row of `LIKE_NEWLINE` begins as that of the newline, shorter, others as the mean of all rows. Changes its arguments;
    the names added.
    """
    import torch

    from k2lab.ckpt.gguf import added_token

    vocab: dict[str, int] = spec["model"]["vocab"]
    have = {**vocab, **{entry["content"]: entry["id"] for entry in spec["added_tokens"]}}
    missing = [name for name in (*layout.CHAT_TOKENS, layout.THINK, layout.THINK_END) if name not in have]
    tables = [name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in state]
    first = max(have.values()) + 1
    newline = have.get(layout.to_chars(NEWLINE.encode()))
    for name in tables:
        rows_WD = state[name]
        # rows behind the last token are padding, and never were trained
        mean_D = rows_WD[:first].double().mean(0).to(rows_WD.dtype)
        newline_D = SHORTER * rows_WD[newline] if newline is not None else mean_D
        fresh = [newline_D if token in LIKE_NEWLINE else mean_D for token in missing]
        state[name] = torch.cat([rows_WD[:first], torch.stack(fresh)]) if fresh else rows_WD
    for place, token in enumerate(missing, start=first):
        special = token not in layout.VISIBLE
        spec["added_tokens"].append(added_token(place, token, special))
        if "added_tokens_decoder" in settings:
            settings["added_tokens_decoder"][str(place)] = {
                k: v for k, v in added_token(place, token, special).items() if k != "id"
            }
    if missing:
        config["vocab_size"] = first + len(missing)
    if layout.IM_END in missing:
        settings.setdefault("eos_token", layout.IM_END)
    settings.pop("chat_template", None)
    if settings.get("pad_token") is None and settings.get("eos_token") is not None:
        settings["pad_token"] = settings["eos_token"]
    return missing
