"""The types on which rooms meet. No torch: arrays here are numpy; a `Batch` is turned into tensors by the engine.

Legend of axes (the whole project): `B` batch, `T` packed tokens, `S` sequences (documents) in a pack, `D` width, `H` heads,
`N` no-position head width, `R` rotary head width, `V` value head width, `Q` query latent, `L` key-value latent, `E` experts,
`K` chosen experts or top-k, `F` expert hidden width, `W` vocabulary, `G` group, `P` problem.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np

# ---------------------------------------------------------------- messages


@dataclass(frozen=True)
class Text:
    """Plain text of a message."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """The model's thinking, rendered inside `<think>...</think>`."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool. `arguments` is a JSON text; if it does not parse, `error` says why and the raw text is kept."""

    name: str
    arguments: str
    id: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class ToolResult:
    """What a tool returned to the call `id`."""

    id: str
    content: str


Part = Text | Reasoning | ToolCall | ToolResult


@dataclass(frozen=True)
class Message:
    """One turn: `role` is system, user, assistant or tool; `name` replaces the role as display name."""

    role: Literal["system", "user", "assistant", "tool"]
    parts: tuple[Part, ...]
    name: str | None = None

    @staticmethod
    def text(role: str, text: str) -> Message:
        """A message of one text part."""
        return Message(role=role, parts=(Text(text),))  # type: ignore[arg-type]

    @property
    def content(self) -> str:
        """All text parts joined."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


class StopReason(enum.Enum):
    """Why generation ended. An enum and never a bool: 'finished' has many meanings."""

    EOS = "eos"  # the end-of-turn token was produced
    LENGTH = "length"  # the token limit was reached
    STOP_TOKEN = "stop_token"  # another token that the caller listed
    CONTEXT = "context"  # prompt + limit do not fit the model's window
    ABORTED = "aborted"
    ERROR = "error"


# ---------------------------------------------------------------- training data


@dataclass(frozen=True)
class Sample:
    """Everything trainable: one flat token sequence with per-token streams.

    `tokens` i32[T]; `weight` f32[T] (0 = context only; index 0 always 0); `streams` {name: f32[T] or f32[T,K]}; every stream at
    t is about token t as predicted from tokens < t. `pair` = (pair id, +1 or -1) for preference data. `key` is the stable
    identity of the sample, used for order and randomness; `source` names where it came from; `meta` is free JSON.
    """

    tokens: np.ndarray
    weight: np.ndarray
    key: str
    source: str = ""
    streams: dict[str, np.ndarray] = field(default_factory=dict)
    pair: tuple[int, int] | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Packed samples, shifted once by the packer: position i holds `targets_T[i] = tokens[i+1]`; `weight_T[i]` and
    `streams_T[i]` are those of i+1; the last position of each document has weight 0.

    `tokens_T`, `targets_T`, `positions_T` i64[T]; `weight_T` f32[T]; `starts_S1` i64[S+1] cumulative document boundaries,
    `starts_S1[0] == 0`, `starts_S1[-1] == T`; `keys` and `sources` of the S samples in order; `num_tokens` positions with
    weight != 0. Arrays are numpy on the host and torch tensors once the engine has moved the batch to a device, but for `pair_S`
    and `sign_S`, which stay on the host.
    """

    tokens_T: Any
    targets_T: Any
    weight_T: Any
    positions_T: Any
    starts_S1: Any
    keys: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    streams_T: dict[str, Any] = field(default_factory=dict)
    num_tokens: int = 0  # positions with weight != 0
    pair_S: Any = None  # i64[S]: the pair that a sample belongs to, -1 for none
    sign_S: Any = None  # f32[S]: +1 chosen, -1 rejected, 0 for none


class Feed(Protocol):
    """Where micro-batches come from. `cursor` is plain JSON, valid for any number of ranks."""

    def take(self, num: int) -> list[Batch]: ...
    def cursor(self) -> dict[str, Any]: ...
    def seek(self, cursor: dict[str, Any]) -> None: ...


# ---------------------------------------------------------------- models


@dataclass(frozen=True)
class RowLayout:
    """How QK-Clip must scale the rows of one attention layer's projections. Row ranges are per head, in order
    [nope | rope] for queries and [k_nope | v] for keys/values.

    `q` names the query projection (`q_b_proj` or `q_proj`), `kv` the `kv_b_proj`; both are parameter names.
    """

    layer: int
    q: str
    kv: str
    num_heads: int
    nope: int
    rope: int
    v: int


class Model(Protocol):
    """What the trainer needs of a model; transformers' classes are wrapped to fit it (k2lab.models)."""

    def named_parameters(self) -> Iterator[tuple[str, Any]]: ...
    def hidden(self, batch: Batch) -> Any: ...
    def head(self) -> Any: ...
    def row_layouts(self) -> list[RowLayout]: ...
    def max_logits(self) -> dict[int, Any]: ...
    def expert_counts(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint by its released, logical name (`...gate_proj.weight`, however many tensors it is stored as).

    `shape` of the decoded tensor; `dtype` what `TensorSource.read` gives back, by safetensors' name ("BF16", "F32", ...): int4
    decodes to BF16 exactly, fp8 to F32 exactly, others are as stored; `format` how it is stored; `file` where.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    format: Literal["plain", "fp8_block", "int4_group"]
    file: str


class TensorSource(Protocol):
    """A checkpoint that is read tensor by tensor, or slice by slice; opening it has proven every tensor whole and of a known
    format. What is read are torch tensors on the CPU."""

    def config(self) -> dict[str, Any]: ...
    def names(self) -> list[str]: ...
    def info(self, name: str) -> TensorInfo: ...

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Any:
        """The decoded tensor, or a part of it (rows: first axis, columns: last axis of a matrix); no other bytes are read."""

    def read_into(self, target: Any, name: str, rows: slice | None = None) -> None:
        """Fills `target`, a contiguous CPU tensor of the stored type, with rows of a plain tensor, without a copy in between."""

    def packed(self, name: str, rows: slice | None = None, columns: slice | None = None) -> tuple[Any, Any]:
        """(codes, scales) of an int4_group or fp8_block tensor as stored; columns in whole groups or blocks, rows of fp8 in whole
        blocks."""


# ---------------------------------------------------------------- sampling


@dataclass(frozen=True)
class SampleParams:
    """Decoding settings. `temperature` 0 = greedy. `seed` and the request's key fix every draw. With `top_k_logprobs` > 0 a
    completion also tells the most probable tokens at each of its positions."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    seed: int = 0
    top_k_logprobs: int = 0


@dataclass(frozen=True)
class Completion:
    """Tokens that a sampler produced, with their log-probabilities under the untempered distribution. `top` holds, per token,
    the ids and log-probabilities of the most probable tokens there, most probable first; empty unless asked for."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop: StopReason
    policy_version: int = 0
    top: tuple[tuple[tuple[int, ...], tuple[float, ...]], ...] = ()


@dataclass(frozen=True)
class Rollout:
    """What a model did with one task: the whole conversation as tokens, as they were produced, never rendered again.

    `tokens` i32[T] prompt, the model's tokens and tool results in order; `weight` f32[T] is 1 on tokens that the model
    produced; `logprobs` f32[T] their log-probabilities when they were drawn (0 elsewhere). `rewards` by name and their product
    `reward`; `stop` of the last turn; `policy_version` (first, last) over the turns; `usage` and `timings` {name: number};
    `error` says why a reward or a tool could not judge or serve (then `reward` is 0 and RL leaves the rollout out).
    """

    task: str
    index: int
    messages: tuple[Message, ...]
    tokens: np.ndarray
    weight: np.ndarray
    logprobs: np.ndarray
    rewards: dict[str, float]
    reward: float
    stop: StopReason
    policy_version: tuple[int, int] = (0, 0)
    usage: dict[str, int] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    error: str = ""
    response: str = ""  # decoded text of the model's last turn, special tokens included

    @property
    def key(self) -> str:
        """Stable identity: task and index."""
        return f"{self.task}#{self.index}"

    def samples(self, **streams: np.ndarray) -> list[Sample]:
        """The rollout as training data: one sample with the stream `logprobs` and those given (f32[T])."""
        return [Sample(tokens=self.tokens, weight=self.weight, key=self.key, streams={"logprobs": self.logprobs, **streams})]


@dataclass(frozen=True)
class Group:
    """The rollouts of one task under one policy."""

    task: str
    rollouts: tuple[Rollout, ...]


# ---------------------------------------------------------------- planning


@dataclass(frozen=True)
class PlanInput:
    """What a stage tells the planner about itself; filled without torch.

    `kind`: "train" | "sample" | "cpu". Token arithmetic: `gpus x per_device_batch x grad_acc x seq_len = tokens per step`.
    """

    stage: str
    type: str
    kind: Literal["train", "sample", "cpu"]
    model: Any = None  # a k2lab.specs.ModelSpec or None
    seq_len: int = 0
    per_device_batch: int = 0
    grad_acc: int = 1
    gpus: int = 1
    steps: int | None = None
    token_target: int | None = None
    optimizer: str = ""
    precision: str = "fp32"
    # activations that are computed again in the backward pass: "none" | "layers" | "selective"
    recompute: str = "none"
    notes: tuple[str, ...] = ()
