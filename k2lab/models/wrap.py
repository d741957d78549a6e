"""`TrainModel`: a transformers causal language model as the trainer sees it (`core.types.Model`).

Legend: `T` packed tokens, `S` documents, `D` width, `W` vocabulary, `H` heads, `E` experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from k2lab.core.errors import CheckpointError
from k2lab.core.types import Batch, RowLayout
from k2lab.models import attention, compiling, experts, lora, packed, qat
from k2lab.models.attention import LogitStats
from k2lab.models.pack import Pack
from k2lab.models.swap import swap
from k2lab.specs import ModelSpec, recomputation

# Numbers that decide choices or are exponentiated; they stay fp32 whatever the model's dtype.
ALWAYS_FP32 = ("e_score_correction_bias", "A_log", "dt_bias")


class TrainModel:
    """Wraps `hf` and swaps our parts into it. `spec` is its shape, `config` transformers' config object.

    `hf` remains usable by itself: generation, caches and left-padded batches go through the same modules.
    """

    def __init__(self, hf: Any, spec: ModelSpec) -> None:
        self.hf = swap(hf)
        self.spec = spec
        hf.config._attn_implementation = attention.NAME
        hf.config._experts_implementation = experts.NAME
        self._stats: dict[int, LogitStats] = {
            module.layer_idx: module.k2_stats for module in hf.modules() if hasattr(module, "k2_stats")
        }
        self._routers = {name: module for name, module in hf.named_modules() if hasattr(module, "k2_counts")}
        self.adapters: lora.Settings | None = None  # of low-rank adapters, set where these are put on (`lora.attach`)

    # ------------------------------------------------------------ facts

    @property
    def config(self) -> Any:
        return self.hf.config

    @property
    def device(self) -> torch.device:
        return next(self.hf.parameters()).device

    @property
    def vocab_size(self) -> int:
        return self.hf.config.vocab_size

    @property
    def training(self) -> bool:
        return self.hf.training

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Trainable and frozen parameters under their transformers names; a tied head appears once."""
        yield from self.hf.named_parameters()

    def flops_per_token(self, seq_len: int) -> float:
        """Model flops of forward and backward per token of sequences of `seq_len` tokens. Matrices that are frozen under adapters
        have no gradient: two forward passes instead of three, and the adapters' own three."""
        terms = self.spec.flops_per_token(seq_len)
        if self.adapters is not None:
            terms = {**terms, "matmul": terms["matmul"] * 2 / 3, "adapters": 6.0 * lora.active(self)}
        return sum(terms.values())

    def row_layouts(self) -> list[RowLayout]:
        """Query and key-value projections of every MLA layer, for QK-Clip; empty for dense students."""
        query = "q_proj" if self.spec.q_lora_rank is None else "q_b_proj"
        return [
            RowLayout(
                layer=layer,
                q=f"model.layers.{layer}.self_attn.{query}.weight",
                kv=f"model.layers.{layer}.self_attn.kv_b_proj.weight",
                num_heads=self.spec.num_attention_heads,
                nope=self.spec.qk_nope_head_dim,
                rope=self.spec.qk_rope_head_dim,
                v=self.spec.v_head_dim,
            )
            for layer in self.spec.layers_of("mla")
        ]

    @property
    def shares_stems(self) -> bool:
        """True if packs may hold branches (`data.branches`): every layer is softmax attention, on the CPU. A recurrent layer or a
        short convolution would have to hand its state from the stem to each branch, and PyTorch's kernels on other devices know
        no branches; their packs hold a copy of the beginning in every document."""
        return self.device.type == "cpu" and not self.spec.layers_of("kda")

    # ------------------------------------------------------------ modes

    def train(self, mode: bool = True) -> TrainModel:
        self.hf.train(mode)
        qat.forget(self.hf)
        return self

    def eval(self) -> TrainModel:
        return self.train(False)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TrainModel:
        """Moves the model; `dtype` leaves router bias and decay parameters in fp32 at least."""
        if dtype is not None:
            for name, tensor in (*self.hf.named_parameters(), *self.hf.named_buffers()):
                # inverse rotary frequencies are no weights and keep their precision; scales are part of a format
                if not tensor.is_floating_point() or name.endswith(("inv_freq", *packed.SCALES)):
                    continue
                keep = name.rsplit(".", 1)[-1] in ALWAYS_FP32
                tensor.data = tensor.data.to(torch.promote_types(dtype, torch.float32) if keep else dtype)
        if device is not None:
            self.hf.to(device)
        return self

    def qat(self, format: str | None = "int4_group", where: str | None = None) -> TrainModel:
        """Quantisation-aware training of the routed experts: from now on every pass multiplies by the values that an export in
        this format holds; None ends it. Raises RecipeError if the model has no such experts (`where`: the recipe's key)."""
        qat.switch(self, format, where)
        return self

    @property
    def qat_format(self) -> str | None:
        """The format of quantisation-aware training that is on."""
        return qat.format_of(self.hf)

    def recompute(self, mode: str = "layers", seq_len: int = 4096) -> TrainModel:
        """What the backward pass computes again: "none"; "layers", every layer from its input (least memory, about a third more
        time); "selective", of each layer the block that frees a byte for fewer flops in sequences of `seq_len` tokens
        (`specs.recomputation`). Loss and gradients are the same. Raises RecipeError for another mode."""
        again = recomputation.recomputed(self.spec, mode, seq_len, self.head().element_size(), "recompute")
        on = mode == "layers"
        for layer, names in zip(self.hf.base_model.layers, again):
            layer.k2_recompute = "" if on or not names else names[0]
        # transformers renamed the pair; older versions in our range have only the second name
        verb = "enable" if on else "disable"
        switch = getattr(self.hf, f"activation_checkpointing_{verb}", None) or getattr(self.hf, f"gradient_checkpointing_{verb}")
        switch({"use_reentrant": False}) if on else switch()
        return self

    def compile(self, on: bool = True, where: str | None = None) -> TrainModel:
        """From now on training passes take compiled layers (`compiling`). Raises RecipeError for families whose layers are not
        compiled (`where`: the recipe's key), MachineError where the compiler cannot run."""
        if on:
            self.spec.require_compilable(where)
            compiling.prepare(self.device)
        for layer in self.hf.base_model.layers:
            layer.k2_compile = on
        return self

    # ------------------------------------------------------------ computing

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Hidden states after the final norm, [T, D]. Documents of the pack do not see each other in any layer.

        In training (and with gradients enabled) tokens per expert are counted and maximum logits observed, once per call. A batch
        whose documents continue others (`parent_S`) is for models with `shares_stems` only.
        """
        device = self.device
        tokens_T = torch.as_tensor(batch.tokens_T, device=device).long()
        positions_T = torch.as_tensor(batch.positions_T, device=device).long()
        parent_S = getattr(batch, "parent_S", None)
        assert parent_S is None or self.shares_stems, "this model needs a copy of the beginning in every document"
        # `engine.step.to_device` leaves the boundaries on the host, too: reading them back would wait for the device
        pack = Pack.of(getattr(batch, "starts_host_S1", batch.starts_S1), device, parent_S)
        # transformers leaves a mask of four axes as it is. Without one it would ask the device, and wait, whether positions begin
        # anew somewhere. Attention with a pack reads no mask.
        mask = tokens_T.new_empty(1, 1, 1, 1)
        with self._observing(self.training and torch.is_grad_enabled(), pack.times_T):
            out = self.hf.base_model(
                input_ids=tokens_T[None], attention_mask=mask, position_ids=positions_T[None], use_cache=False, k2_pack=pack
            )
        return out.last_hidden_state[0]

    def head(self) -> torch.Tensor:
        """Weights of the output layer, [W, D]; logits are hidden W^T."""
        return self.hf.get_output_embeddings().weight

    @contextmanager
    def _observing(self, on: bool, times_T: torch.Tensor | None) -> Iterator[None]:
        token = attention.packing.set(True)
        self._set_observing(on, times_T)
        try:
            yield
        finally:
            attention.packing.reset(token)
            self._set_observing(False)

    def _set_observing(self, on: bool, times_T: torch.Tensor | None = None) -> None:
        for stats in self._stats.values():
            stats.active = on
        for router in self._routers.values():
            router.k2_counting, router.k2_times = on, times_T

    # ------------------------------------------------------------ observations

    def capture_max_logits(self, tau: float | None = None) -> None:
        """Sets the threshold of QK-Clip. On a CPU maxima are exact at every step whatever it is. On a GPU they are exact
        where cuDNN's kernel attends; elsewhere upper bounds (which suffice while they are below `tau`), and exact in layers where
        a bound exceeds `tau`."""
        for stats in self._stats.values():
            stats.tau = tau

    def max_logits(self) -> dict[int, torch.Tensor]:
        """{layer: [H]} largest scaled logit before softmax per head since `reset_max_logits`; layers that saw nothing are
        absent."""
        return {layer: stats.max_H.clone() for layer, stats in self._stats.items() if stats.max_H is not None}

    def max_logits_exact(self) -> dict[int, bool]:
        """{layer: True if `max_logits` of the layer is exact, False if it is an upper bound}."""
        return {layer: stats.exact for layer, stats in self._stats.items() if stats.max_H is not None}

    def reset_max_logits(self) -> None:
        for stats in self._stats.values():
            stats.reset()

    def routers(self) -> dict[str, torch.nn.Module]:
        """{module name: router}; each has `e_score_correction_bias` [E]."""
        return dict(self._routers)

    def expert_counts(self) -> dict[str, torch.Tensor]:
        """{router's module name: i64[E] tokens sent to each expert since `reset_expert_counts`}."""
        return {name: router.k2_counts.clone() for name, router in self._routers.items()}

    def reset_expert_counts(self) -> None:
        for router in self._routers.values():
            router.k2_counts.zero_()

    # ------------------------------------------------------------ state

    def weights(self) -> Mapping[str, torch.Tensor]:
        """Parameters and router biases by transformers name, in this model's number type, as of a dense model without adapters:
        references where there are such tensors; merged or decoded ones are computed when they are asked for."""
        return lora.Weights(self)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that training changes: parameters and router biases, by transformers name; of a model with adapters these
        alone. References, not copies."""
        if self.adapters is not None:
            return {name: tensor.detach() for name, tensor in self.hf.named_parameters() if lora.is_factor(name)}
        tied = {"lm_head.weight"} if self.spec.tie_word_embeddings else set()
        return {name: tensor for name, tensor in self.hf.state_dict().items() if name not in tied}

    @torch.no_grad()
    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Copies what `state` gave back into the model. Raises CheckpointError if names or shapes differ."""
        own = self.state()
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())
            raise CheckpointError(
                f"the checkpoint's tensors are not this model's: {len(odd)} names differ", got=", ".join(odd[:5])
            )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise CheckpointError(f"{name} has another shape", got=list(state[name].shape), allowed=str(list(tensor.shape)))
            tensor.copy_(state[name])
