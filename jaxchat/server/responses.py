"""What the server answers, for its OpenAPI schema; tests hold the answers to it."""

from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length"]


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    """A token that could have stood here."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of the reply."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The tokens of a message's text."""

    content: list[TokenLogprob]
    refusal: None = None


class ReplyPart(BaseModel):
    """Text, a call of the calculator, or what that gave."""

    type: Literal["text", "python", "python_output"]
    text: str


class ReplyMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None = None
    parts: list[ReplyPart] | None = None
    """The whole reply where it called the calculator; an extension."""


class ChatChoice(BaseModel):
    """One of n replies."""

    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """`POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    """Parallel lists, one entry a token; null where nothing comes before it."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of n continuations of one of the prompts."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(BaseModel):
    """`POST /v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class SamplingDefaults(BaseModel):
    """How tokens are chosen for a chat request that does not say."""

    temperature: float
    top_k: int
    """0 for all tokens."""


class ModelCard(BaseModel):
    """A model that the server has."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    default_sampling_params: SamplingDefaults
    """An extension."""


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokens(BaseModel):
    """`POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(BaseModel):
    """`POST /detokenize`."""

    prompt: str


class TokenizerInfo(BaseModel):
    """`GET /tokenizer_info`."""

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str
    bos_token_id: int
    eos_token: str
    eos_token_id: int
    pad_token: str
    pad_token_id: int
    special_tokens: dict[str, int]
    chat_template: None = None


class Health(BaseModel):
    """`GET /health` and `GET /ready`."""

    status: Literal["ok"]
    ready: bool


class Replica(BaseModel):
    """One engine."""

    name: str
    device: str
    slots: int
    load: int
    available: bool


class Stats(BaseModel):
    """`GET /stats`."""

    model: str
    total_workers: int
    available_workers: int
    workers: list[Replica]
