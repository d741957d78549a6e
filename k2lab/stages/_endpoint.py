"""The table in which a recipe names a model behind an HTTP address."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from k2lab.core.errors import RecipeError
from k2lab.core.stage import RunFlag


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A model behind an OpenAI-compatible chat address. Keys come from the environment only."""

    type: Literal["openai"] = "openai"
    # The base address, ending in /v1, and the name under which the server knows the model.
    url: Annotated[str, RunFlag()]
    model: str
    # Name of the environment variable that holds the key; none is sent without it.
    key_env: Annotated[str | None, RunFlag()] = None
    # Licence or terms of the answers, for the manifest.
    license: str | None = None
    # The server can give token ids (vLLM's return_tokens_as_token_ids); with them top_k works.
    token_ids: bool = False
    # More fields of each request, e.g. { chat_template_kwargs = { thinking = true } }.
    extra: dict[str, Any] = field(default_factory=dict)
    # Requests at a time; at most so many begun in a minute (0 = any); seconds for an answer; more tries after a failure.
    concurrency: Annotated[int, RunFlag()] = 8
    per_minute: Annotated[float, RunFlag()] = 0.0
    timeout_s: Annotated[float, RunFlag()] = 120.0
    retries: Annotated[int, RunFlag()] = 6
    # Pause before the first retry in seconds; it doubles each time.
    pause_s: Annotated[float, RunFlag()] = 1.0

    def __post_init__(self) -> None:
        from urllib.parse import urlsplit

        parts = urlsplit(self.url)
        if parts.username or parts.password or parts.query:
            raise RecipeError(
                "an address holds no user, password or query", where="url", next="Name the key's variable in key_env"
            )
        if self.concurrency < 1 or self.retries < 0 or self.timeout_s <= 0:
            raise RecipeError(
                "concurrency and timeout_s must be positive, retries not negative",
                got=f"concurrency={self.concurrency}, timeout_s={self.timeout_s}, retries={self.retries}",
            )

    def connect(self, where: str) -> Any:
        """The endpoint as `sampling.openai.ChatEndpoint`. RecipeError if the key's variable is not set."""
        import os

        from k2lab.sampling.openai import ChatEndpoint

        key = os.environ.get(self.key_env) if self.key_env else None
        if self.key_env and not key:
            raise RecipeError(
                f"the environment variable {self.key_env} is not set", where=f"{where}.key_env", next=f"export {self.key_env}=..."
            )
        return ChatEndpoint(
            self.url,
            self.model,
            key=key,
            timeout_s=self.timeout_s,
            retries=self.retries,
            concurrency=self.concurrency,
            per_minute=self.per_minute,
            token_ids=self.token_ids,
            extra=self.extra,
            pause_s=self.pause_s,
        )
