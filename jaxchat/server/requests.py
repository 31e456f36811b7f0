"""What clients may ask: the bodies of OpenAI's API, with vLLM's extra samplers.

Fields that are not listed are ignored, because clients send many; fields that would change the
answer in a way that this server cannot follow are listed and refused. `null` is "not given".
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from jaxchat.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_REPETITION_PENALTY,
    MAX_TOP_LOGPROBS,
    MIN_REPETITION_PENALTY,
    SamplingParams,
)

MAX_STOPS, MAX_STOP_LENGTH = 16, 256
"""Stop strings of a request, and characters of each."""

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
# lists and biases end at their first error: a million of them would hold everyone up
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Refused = Annotated[None, Field(description="Not supported: leave it out.")]
# of what is refused, what clients send that mean nothing by it
NoText = Annotated[str, Field(max_length=0)]
NoList = Annotated[list[Any], Field(max_length=0)]
NoObject = Annotated[dict[str, Any], Field(max_length=0)]


class Body(BaseModel):
    """Values are of the type that the schema says: no `"5"` for 5."""

    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(Body):
    """What else a stream tells."""

    include_usage: bool | None = None
    """Whether a last chunk counts the tokens."""


class ResponseFormat(Body):
    """Only plain text is written."""

    type: Literal["text"]


class Refusals(Body):
    """What other servers take for both kinds of generation, and this one does not."""

    response_format: ResponseFormat | None = None
    structured_outputs: NoObject | None = None
    guided_json: NoText | NoObject | None = None
    guided_regex: NoText | None = None
    guided_choice: NoList | None = None
    guided_grammar: NoText | None = None
    tools: NoList | None = None
    stop_token_ids: NoList | None = None
    include_stop_str_in_output: Literal[False] | None = None
    min_tokens: Literal[0] | None = None
    bad_words: NoList | None = None
    allowed_token_ids: NoList | None = None
    prompt_logprobs: Refused = None
    truncate_prompt_tokens: Refused = None
    use_beam_search: Literal[False] | None = None


class Sampling(Refusals):
    """What both kinds of generation take."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: FiniteFloat | None = Field(None, ge=0, le=2)
    top_p: FiniteFloat | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="0 or -1 keeps all.")
    min_p: FiniteFloat | None = Field(None, ge=0, le=1)
    presence_penalty: FiniteFloat | None = Field(None, ge=-2, le=2)
    frequency_penalty: FiniteFloat | None = Field(None, ge=-2, le=2)
    repetition_penalty: FiniteFloat | None = Field(
        None, ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY
    )
    logit_bias: dict[TokenKey, Annotated[FiniteFloat, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=MAX_LOGIT_BIAS, fail_fast=True
    )
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    n: int | None = Field(None, ge=1, le=128)
    ignore_eos: bool | None = Field(None, description="Write on to max_tokens, for benchmarks.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    def sampling(
        self, *, max_tokens: int, seed: int, temperature: float, top_k: int, top_logprobs: int
    ) -> SamplingParams:
        """The engine's parameters; `temperature` and `top_k` where the request names none."""

        def given(value: float | None, default: float) -> float:
            return default if value is None else value

        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=given(self.temperature, temperature),
            top_k=max(0, top_k if self.top_k is None else self.top_k),
            top_p=given(self.top_p, 1.0),
            min_p=given(self.min_p, 0.0),
            presence_penalty=given(self.presence_penalty, 0.0),
            frequency_penalty=given(self.frequency_penalty, 0.0),
            repetition_penalty=given(self.repetition_penalty, 1.0),
            logit_bias=tuple(bias.items()),
            seed=(seed if self.seed is None else self.seed) % 2**63,
            stop=stop,
            ignore_eos=bool(self.ignore_eos),
            top_logprobs=top_logprobs,
        )

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with a count of its tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class Part(Body):
    """A piece of a message."""

    type: Literal["text", "python", "python_output"]
    """The last two only in an assistant's message: calls of the calculator and what they gave."""
    text: str


class Message(Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(fail_fast=True)]
    parts: Annotated[list[Part], Field(fail_fast=True)] | None = Field(
        None, description="Of an answer that is sent back: all of it, of which content is the text."
    )


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    functions: NoList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    audio: Refused = None
    web_search_options: Refused = None
    echo: Literal[False] | None = None
    add_generation_prompt: Literal[True] | None = None
    continue_final_message: Literal[False] | None = None


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    )
    max_tokens: int | None = Field(None, ge=0, description="16 unless given; 0 only with echo.")
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None
    best_of: Literal[1] | None = None
    suffix: Refused = None
    add_special_tokens: bool | None = Field(
        None, description="Begin a text with <|bos|>; true, or token ids are sent."
    )


class TokenizeRequest(Body):
    """`POST /tokenize`: a text, or a conversation as the model would read it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = Field(None, description="Begin a text with <|bos|>; true.")
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
