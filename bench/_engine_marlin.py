"""Reading experts back out of vLLM's Marlin kernel: not as they lie there (shuffled codes and scales), but as it multiplies by
them.

A row of zeros with a single one, multiplied by a matrix, gives one of its columns, and with one non-zero product nothing is
rounded. So the kernel that served the prompts is called with unit vectors, expert by expert; between its two products, where the
activation function stands, the first product is kept and unit vectors are put in for the second.

Legend: `E` experts, `D` width, `F` expert hidden width, `M` rows.
"""

from __future__ import annotations

from typing import Any

# Arguments that belong to a call and not to a layer's weights.
OF_THE_CALL = {
    "hidden_states", "topk_weights", "topk_ids", "activation_func", "moe_sum", "expert_map", "output", "global_num_experts",
    "intermediate_cache13", "intermediate_cache2", "workspace", "apply_router_weight_on_input",
}  # fmt: skip


def watch() -> dict[int, dict[str, Any]]:
    """Notes the weights of every layer that vLLM's Marlin kernel computes from now on, in the order of the layers."""
    from vllm.model_executor.layers.fused_moe.experts import marlin_moe

    layers: dict[int, dict[str, Any]] = {}
    original = marlin_moe.fused_marlin_moe

    def noting(**arguments: Any) -> Any:
        known = layers.setdefault(arguments["w1"].data_ptr(), {"call": original})
        known |= {key: value for key, value in arguments.items() if key not in OF_THE_CALL}
        known["experts"], known["width"] = arguments["w1"].shape[0], arguments["hidden_states"].shape[1]
        return original(**arguments)

    marlin_moe.fused_marlin_moe = noting
    return layers


def values(layer: dict[str, Any]) -> tuple[Any, Any]:
    """(gate and up bf16[E, 2F, D], down bf16[E, D, F]) of a layer that `watch` noted."""
    import torch
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import marlin_moe_intermediate_size

    arguments = {key: value for key, value in layer.items() if key not in ("call", "experts", "width")}
    kept: dict[str, torch.Tensor] = {}
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def unit(rows: int, columns: int) -> torch.Tensor:
        return torch.eye(rows, columns, dtype=torch.bfloat16, device="cuda")

    def between(_: Any, out_MF: torch.Tensor, product_M2F: torch.Tensor, *args: Any, **more: Any) -> None:
        kept["product"] = product_M2F.clone()
        out_MF.copy_(unit(*out_MF.shape))

    width = layer["width"]
    rows = max(width, marlin_moe_intermediate_size(layer["w1"], layer["w2"]))
    for expert in range(layer["experts"]):
        down_MD = layer["call"](
            hidden_states=unit(rows, width),
            topk_weights=torch.ones(rows, 1, device="cuda"),
            topk_ids=torch.full((rows, 1), expert, dtype=torch.int32, device="cuda"),
            global_num_experts=layer["experts"],
            activation_func=between,
            **arguments,
        )
        gate_up_2FD = kept["product"][:width].T.cpu()
        found.append((gate_up_2FD, down_MD[: len(gate_up_2FD) // 2].T.cpu()))
    return torch.stack([each[0] for each in found]).contiguous(), torch.stack([each[1] for each in found]).contiguous()


def write(layers: dict[int, dict[str, Any]], file: str) -> None:
    """Safetensors `gate_up.N` and `down.N` of the N-th layer with routed experts."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    with torch.inference_mode():
        for place, layer in enumerate(layers.values()):
            tensors[f"gate_up.{place}"], tensors[f"down.{place}"] = values(layer)
    save_file(tensors, file)
