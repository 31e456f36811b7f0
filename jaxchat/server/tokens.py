"""`/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM has them."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from jaxchat.server import responses
from jaxchat.server.chat import conversation_ids
from jaxchat.server.errors import ApiError, AsciiJSON, documented
from jaxchat.server.requests import DetokenizeRequest, TokenizeRequest
from jaxchat.server.service import Service, service_of

router = APIRouter()

ERRORS = documented(400, 401, 404, 408, 413, 429, 503)


@router.post("/tokenize", response_model=responses.Tokens, responses=ERRORS)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The ids of a text, or of the prompt that a conversation makes."""
    service = service_of(request, body.model)
    return await run_in_threadpool(_tokens, service, body)


@router.post("/detokenize", response_model=responses.Text, responses=ERRORS)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of ids; special tokens are written `<|name|>`."""
    service = service_of(request, body.model)
    try:
        text = await run_in_threadpool(service.tokenizer.decode, body.tokens)
    except ValueError as error:
        raise ApiError(400, f"{error}.", param="tokens") from error
    return AsciiJSON({"prompt": text})


@router.get(
    "/tokenizer_info", response_model=responses.TokenizerInfo, responses=documented(401, 429)
)
async def tokenizer_info(request: Request) -> Response:
    """What a client needs to know of the tokenizer."""
    service = service_of(request)
    tokenizer = service.tokenizer
    specials = {f"<|{name}|>": tokenizer.special_id(name) for name in tokenizer.special_names}
    bos, end = "<|bos|>", "<|assistant_end|>"
    answer = {
        "tokenizer_class": "jaxchat",
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": service.max_length,
        "bos_token": bos,
        "bos_token_id": specials[bos],
        "eos_token": end,
        "eos_token_id": specials[end],
        "pad_token": end,
        "pad_token_id": specials[end],
        "special_tokens": specials,
        "chat_template": None,
    }
    return AsciiJSON(answer)


def _tokens(service: Service, body: TokenizeRequest) -> Response:
    ids = _ids(service, body)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": service.max_length, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [service.tokenizer.decode([id]) for id in ids]
    return AsciiJSON(answer)


def _ids(service: Service, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "Give either a prompt or messages.", param="prompt")
    if body.messages is not None:
        return conversation_ids(service, body.messages)
    assert body.prompt is not None
    with_bos = body.add_special_tokens is None or body.add_special_tokens
    return [service.tokenizer.bos_id] * with_bos + service.tokenizer.encode(body.prompt)
