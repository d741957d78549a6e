"""Lets transformers answer prompts; started by serve_parity.py, with the same job and answer as _engine_vllm.py.

    python bench/_engine_transformers.py JOB.json ANSWER.json

Quantised folders are dequantised as transformers does it on a CPU: INT4 by compressed-tensors, FP8 by its own integration. What
is answered is transformers' own model with its own attention and experts; k2lab is not imported.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers


def load(folder: str, dtype: str) -> Any:
    """transformers' model of a folder with Kimi K2's config.json. transformers knows the shape under its first name only."""
    table = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    for key in ("model_type", "architectures", "torch_dtype"):
        table.pop(key, None)
    config = transformers.DeepseekV3Config.from_dict(table)
    kind = getattr(torch, dtype)
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(folder, config=config, dtype=kind)
    # what was quantised comes as bf16 whatever was asked for, and would be multiplied in bf16
    return model.to(kind).eval()


@torch.inference_mode()
def generate(model: Any, prompts: list[list[int]], tokens: int, draw: bool) -> list[dict[str, Any]]:
    """Prompts of one length are answered together, so that nothing is padded."""
    rows: list[dict[str, Any]] = [{} for _ in prompts]
    for length in sorted({len(prompt) for prompt in prompts}):
        places = [n for n, prompt in enumerate(prompts) if len(prompt) == length]
        torch.manual_seed(length)
        ids = torch.tensor([prompts[n] for n in places])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=draw,
            top_k=0,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        made = out.sequences[:, length:]
        logprobs = torch.stack(out.logits, 1).float().log_softmax(-1).gather(2, made.unsqueeze(2))[..., 0]
        for row, n in enumerate(places):
            rows[n] = {"tokens": made[row].tolist(), "logprobs": logprobs[row].tolist()}
    return rows


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    began = time.time()
    model = load(job["model"], job["dtype"])
    loaded = time.time()
    table = json.loads((Path(job["model"]) / "config.json").read_text(encoding="utf-8"))
    method = (table.get("quantization_config") or {}).get("quant_method")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    try:
        import compressed_tensors

        versions["compressed-tensors"] = compressed_tensors.__version__
    except ImportError:
        pass
    answer: dict[str, Any] = {
        "engine": f"transformers {transformers.__version__}",
        "versions": versions,
        "device": "cpu",
        "kernels": {"weights": f"dequantised by transformers' reader of {method}" if method else "as stored"},
        "greedy": generate(model, job["prompts"], job["tokens"], draw=False),
        "drawn": generate(model, job["prompts"], job["tokens"], draw=True),
        "seconds_to_load": loaded - began,
        "seconds": time.time() - loaded,
    }
    if job.get("messages"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"], config=model.config)  # it knows no kimi_k2
        rendered = tokenizer.apply_chat_template(job["messages"], add_generation_prompt=True, tokenize=True, return_dict=False)
        answer["chat"] = list(rendered)
        configured = model.generation_config.eos_token_id
        answer["ends"] = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
