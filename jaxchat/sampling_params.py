"""How a reply is drawn, as requests and scripts say it; sampling.py draws it."""

import math
from dataclasses import dataclass

CHAT_TEMPERATURE, TEXT_TEMPERATURE = 0.6, 0.8
"""How freely a chat model replies, and how freely a base model continues a text, as upstream's."""

CHAT_TOP_K = 50
"""Tokens that both choose from."""

MAX_TOP_LOGPROBS = 20
"""Most alternatives reported beside a token, as in OpenAI's API."""

MAX_TOP_K = 2**31 - 1
"""Devices count in int32."""

MAX_LOGIT_BIAS = 300
"""Most tokens whose logits one request may bias, as in OpenAI's API."""

MAX_REPETITION_PENALTY = 10.0
"""Logits are within 15, so that more changes nothing."""

MIN_REPETITION_PENALTY = 0.1
"""Far smaller ones divide logits to infinity, and the softmax of that is not a number."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request turns logits into tokens."""

    max_tokens: int = 256
    """Most tokens to generate."""
    temperature: float = 1.0
    """0 is greedy: the exact argmax."""
    top_k: int | None = None
    """Keep the k most likely tokens; None or 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    min_p: float = 0.0
    """Drop tokens below this share of the most likely one's probability."""
    seed: int = 0
    """Key of the request's random numbers."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that the reply already holds."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit once for every time that the reply already holds it."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that prompt or reply hold, and multiplies negative ones
    (CTRL, arXiv 1909.05858)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit), each token at most once."""
    ignore_eos: bool = False
    """Whether `assistant_end` and `bos` are tokens like any other (for benchmarks)."""
    top_logprobs: int = 0
    """How many of the likeliest tokens are reported beside every chosen one."""

    @property
    def adjusts(self) -> bool:
        """Whether the choice is made from other logits than the model's."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1)
        return any(penalties) or bool(self.logit_bias)

    def __post_init__(self) -> None:
        checks = {
            "max_tokens": self.max_tokens >= 1,
            "temperature": self.temperature >= 0 and math.isfinite(self.temperature),
            "top_k": self.top_k is None or 0 <= self.top_k <= MAX_TOP_K,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "seed": 0 <= self.seed < 2**63,
            "stop": all(self.stop),
            "presence_penalty": -2 <= self.presence_penalty <= 2,
            "frequency_penalty": -2 <= self.frequency_penalty <= 2,
            "repetition_penalty": (
                MIN_REPETITION_PENALTY <= self.repetition_penalty <= MAX_REPETITION_PENALTY
            ),
            "logit_bias": _is_bias(self.logit_bias),
            "top_logprobs": 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS,
        }
        bad = [f"{name}={getattr(self, name)!r}" for name, good in checks.items() if not good]
        if bad:
            raise ValueError(f"sampling parameters out of range: {', '.join(bad)}")


def check_varied(samples: int, *, temperature: float, top_k: int | None) -> None:
    """ValueError, naming the remedy, for several replies that would all be the likeliest one."""
    for greedy, how, remedy in (
        (temperature == 0, "temperature 0", "--temperature 1"),
        (top_k == 1, "top_k 1", f"--top-k {CHAT_TOP_K}"),
    ):
        if greedy and samples > 1:
            raise ValueError(
                f"{samples} samples at {how} are one reply {samples} times: set {remedy}"
            )


def _is_bias(pairs: tuple[tuple[int, float], ...]) -> bool:
    """Whether this is a list of distinct tokens with biases from -100 to 100."""
    return (
        len(pairs) <= MAX_LOGIT_BIAS
        and len({token for token, _ in pairs}) == len(pairs)
        and all(token >= 0 and -100 <= bias <= 100 for token, bias in pairs)
    )
