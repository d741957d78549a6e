"""Lets vLLM answer prompts; started by serve_parity.py in the engine's own Python, which has vllm and need not have k2lab.

    python bench/_engine_vllm.py JOB.json ANSWER.json

JOB: {"model", "dtype", "prompts": [[token]], "tokens", "messages", "options": {of LLM()}}. ANSWER: versions, device, kernels,
greedy and drawn tokens with the engine's log-probabilities of the untempered distribution, the chat as the engine renders it,
the tokens at which it ends an answer. If "weights" names a file, the routed experts that Marlin computes are written there, as
it multiplies by them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import _engine_marlin

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # functions are sent to the model, by ourselves
# in one process the model can be asked what its layers are
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

# vLLM's rotary kernel for CPUs misreads the strided slices that latent attention gives it: queries are rotated wrongly, by
# amounts that depend on the other requests of the batch. PyTorch's own operations, which the compiled mode uses, are right.
CPU = {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}


def generate(llm: Any, prompts: list[list[int]], **params: Any) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    each = [
        SamplingParams(ignore_eos=True, detokenize=False, logprobs=0, seed=n if params["temperature"] else None, **params)
        for n in range(len(prompts))
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], each, use_tqdm=False)
    rows = []
    for output in outputs:
        tokens = list(output.outputs[0].token_ids)
        logprobs = [step[token].logprob for token, step in zip(tokens, output.outputs[0].logprobs)]
        rows.append({"tokens": tokens, "logprobs": logprobs})
    return rows


def parts(model: Any) -> dict[str, str]:
    """{kind of layer: the engine's classes that compute it}."""
    found: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None and name.rsplit(".", 1)[-1] in ("kv_b_proj", "routed_experts", "experts", "gate_up_proj"):
            kernel = getattr(method, "experts_cls", None) or getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
            label = getattr(kernel, "__name__", None) or (type(kernel).__name__ if kernel is not None else "")
            found.setdefault(name.rsplit(".", 1)[-1], set()).add(" ".join(filter(None, [type(method).__name__, label])))
        if hasattr(module, "impl") and hasattr(module, "kv_cache_dtype"):
            found.setdefault("attention", set()).add(type(module.impl).__name__)
    return {kind: ", ".join(sorted(classes)) for kind, classes in found.items()}


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    began = time.time()
    import torch
    import transformers
    import vllm
    from vllm import LLM

    gpu = torch.cuda.is_available()
    options = {"enforce_eager": True, "enable_prefix_caching": False, "max_num_seqs": 64, "seed": 0, "max_model_len": 512}
    options |= ({} if gpu else CPU) | job.get("options", {})
    layers = _engine_marlin.watch() if gpu and job.get("weights") else {}
    llm = LLM(job["model"], dtype=job["dtype"], **options)
    loaded = time.time()
    answer: dict[str, Any] = {
        "engine": f"vLLM {vllm.__version__}",
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "kernels": llm.apply_model(parts)[0],
        "greedy": generate(llm, job["prompts"], temperature=0.0, max_tokens=job["tokens"]),
        "drawn": generate(llm, job["prompts"], temperature=1.0, max_tokens=job["tokens"]),
        "seconds_to_load": loaded - began,
        "seconds": time.time() - loaded,
    }
    if job.get("messages"):
        tokenizer = llm.get_tokenizer()
        rendered = tokenizer.apply_chat_template(job["messages"], add_generation_prompt=True, tokenize=True, return_dict=False)
        answer["chat"] = list(rendered)
        configured = llm.llm_engine.model_config.try_get_generation_config().get("eos_token_id")
        answer["ends"] = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    if layers:
        _engine_marlin.write(layers, job["weights"])
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main()
