"""What a server allows. The defaults are those of a machine that strangers can reach."""

from dataclasses import dataclass, field

from jaxchat.sampling_params import CHAT_TEMPERATURE, CHAT_TOP_K

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Names of this machine. A page of another site that resolves its own name to us is refused."""


@dataclass(frozen=True)
class ServerSettings:
    """Limits and defaults of one server."""

    model_name: str
    """The model's id in `/v1/models`."""
    temperature: float = CHAT_TEMPERATURE
    """Of chat requests that name none; plain completions take 1, as OpenAI's API does."""
    top_k: int = CHAT_TOP_K
    """Likewise; plain completions keep all."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Accepted bearer tokens; none means that nobody is asked for one."""
    requests_per_minute: int = 600
    """Per API key; 0 is no limit."""
    allowed_hosts: tuple[str, ...] = LOOPBACK
    """Accepted host names of a request; empty accepts any."""
    allowed_origins: tuple[str, ...] = ()
    """Sites whose pages may call the API (CORS)."""
    max_body_bytes: int = 1 << 20
    """Longest request body."""
    max_messages: int = 512
    """Most messages of one conversation."""
    max_samples: int = 128
    """Most replies of one request: prompts times n."""
    max_logprobs: int = 1 << 20
    """Most log-probabilities of one answer, replies x tokens x (1 + alternatives): enough to score
    128 texts of 4,096 tokens for lm-eval. In JSON they are 33 MB, of a chat 70."""
    max_waiting: int = 256
    """Replies that may wait for a slot; beyond, requests are sent away."""
    timeout_s: float = 300.0
    """Longest that one request may take."""

    def __post_init__(self) -> None:
        positive = ("max_body_bytes", "max_messages", "max_samples", "max_logprobs")
        positive += ("max_waiting", "timeout_s")
        bad = [f"{name}={getattr(self, name)}" for name in positive if getattr(self, name) <= 0]
        natural = ("requests_per_minute", "top_k")
        bad += [f"{name}={getattr(self, name)}" for name in natural if getattr(self, name) < 0]
        bad += [f"temperature={self.temperature} (0 to 2)"] * (not 0 <= self.temperature <= 2)
        if bad:
            raise ValueError(f"server settings out of range: {', '.join(bad)}")
        if not all(self.api_keys):
            raise ValueError("an API key is empty: remove it or the blank line that it stands on")
