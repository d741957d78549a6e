"""What a conversion or a comparison reads: opened folders of any kind, what identifies them, the files beside the weights."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

from k2lab.ckpt import dcp, integrity, origin
from k2lab.ckpt.folder import open_folder
from k2lab.ckpt.layout import INDEX
from k2lab.ckpt.strict import read_object

# What lies beside weights and belongs to the model whatever its weights are stored as.
BESIDE = (
    "tokenizer*.json",
    "tokenization_*.py",
    "*.tiktoken",
    "tiktoken.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "generation_config.json",
    "*processor*.json",
    "configuration_*.py",
    "modeling_*.py",
    "*process*.py",
    "tool_declaration_ts.py",
    "LICENSE*",
    "NOTICE*",
    "THIRD_PARTY_NOTICES*",
)
_WEIGHTS = ("*.safetensors", "*.distcp", dcp.METADATA, "config.json", "adapter_config.json", INDEX, origin.ORIGIN)


def open_source(path: Path) -> Any:
    """The checkpoint in a folder: safetensors, or a DCP folder with config.json beside. What opening says about vision tensors is
    said elsewhere."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*vision tensors are left where they are")
        return dcp.open_dcp(path) if dcp.is_dcp(path) else open_folder(path)


def files_of(source: Any, name: str) -> list[Path]:
    """The files that hold a tensor."""
    if isinstance(source, dcp.DcpFolder):
        return sorted(path.resolve() for path in source.paths(name))
    return sorted({source.file_of(stored).path.resolve() for stored in source.stored(name)})


def beside(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that a conversion copies: tokenizer, chat template, generation config, code, licences."""
    return sorted({file for pattern in BESIDE for file in folder.glob(pattern) if file.is_file()})


def fingerprint(folder: Path) -> str:
    """Says whether a folder is the same as before: of every file that a conversion reads name, size, and its stated sha256 or
    else the time it was changed."""
    stated = stated_sums(folder)
    table = []
    for file in sorted({*beside(folder), *(file for pattern in _WEIGHTS for file in folder.glob(pattern) if file.is_file())}):
        about = file.stat()
        table.append([file.name, about.st_size, stated.get(file.resolve()) or about.st_mtime_ns])
    return hashlib.sha256(json.dumps(table).encode()).hexdigest()


def stated_sums(folder: Path) -> dict[Path, str]:
    """{file: sha256} where the folder states checksums: its checksums.json, SHA256SUMS, artifact manifest, or what `k2 fetch`
    wrote."""
    found = {file.resolve(): facts["sha256"] for file, facts in integrity.stated_digests(folder)}
    if (folder / "fetched.json").is_file():
        files = read_object(folder / "fetched.json").get("files")
        for name, facts in files.items() if isinstance(files, dict) else ():
            if isinstance(facts, dict) and isinstance(facts.get("sha256"), str):
                found.setdefault((folder / name).resolve(), facts["sha256"])
    return found
