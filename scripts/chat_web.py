"""Serve a model to a browser and to every client of OpenAI's API.

    python -m scripts.chat_web                # the deepest finetuned model, for this machine only
    python -m scripts.chat_web -i all         # every stage there is, to compare side by side
    python -m scripts.chat_web --replicas 8   # one engine on each of eight local devices
    python -m scripts.chat_web --host 0.0.0.0 --api-key-file keys.txt   # one key a line

Point a client at http://127.0.0.1:8000/v1. `/ready` answers 200 once everything is compiled,
`/metrics` is for Prometheus. SIGTERM lets replies that are under way end, then exits with 0.
API keys may also come in JAXCHAT_API_KEYS, separated by commas.
"""

import contextlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from jaxchat import cli
from jaxchat.backend import DEFAULT_BACKEND, BackendName
from jaxchat.checkpoint import CheckpointStore
from jaxchat.engine import PREFILL_TOKENS, SLOTS, Engine
from jaxchat.server import serve
from jaxchat.server.app import create_app
from jaxchat.server.settings import LOOPBACK, ServerSettings
from jaxchat.stages import StageName, find_model_tag, load_model, stage_directory


@dataclass(frozen=True)
class Config:
    """Which model, where, and for whom."""

    source: Annotated[StageName | Literal["all"], cli.arg(aliases=["-i"])] = "sft"
    """Stage of the model, or all that have one; a base model continues text, others converse."""
    model_tag: Annotated[str | None, cli.arg(aliases=["-g"])] = None
    """Model of that stage, such as d12; the deepest when not set."""
    step: Annotated[int | None, cli.arg(aliases=["-s"])] = None
    """Checkpoint of that model; the newest when not set."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is every address of this machine, :: those of IPv6 too."""
    port: Annotated[int, cli.arg(aliases=["-p"])] = 8000
    """Port to listen at."""
    replicas: int = 1
    """Engines, each on a local device of its own."""
    slots: int = SLOTS
    """Replies that an engine writes at the same time."""
    max_length: int | None = None
    """Tokens of a prompt and its reply together; the model's context when not set."""
    batch_invariant: bool = False
    """Slower, but the same request and seed get the same reply beside any others, in any dtype."""
    temperature: Annotated[float, cli.arg(aliases=["-t"])] = ServerSettings.temperature
    """Of chat requests that name none."""
    top_k: Annotated[int, cli.arg(aliases=["-k"])] = ServerSettings.top_k
    """Of chat requests that name none; 0 for all."""
    api_key_file: Path | None = None
    """File with one API key a line; without keys nobody is asked for one."""
    requests_per_minute: int = ServerSettings.requests_per_minute
    """For each API key; 0 for no limit."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names that the server answers to, besides the address it listens at."""
    allowed_origins: tuple[str, ...] = ()
    """Sites whose pages may call the API, such as https://example.org."""
    max_waiting: int = ServerSettings.max_waiting
    """Replies that may wait for a slot before requests are sent away."""
    timeout_s: float = ServerSettings.timeout_s
    """Longest that one request may take."""
    grace_s: int = 30
    """How long replies that are under way may take when the server is told to stop."""
    backend: BackendName = DEFAULT_BACKEND
    """Framework that runs the model."""

    def __post_init__(self) -> None:
        bad = [
            f"{name}={getattr(self, name)}"
            for name in ("replicas", "slots")
            if getattr(self, name) < 1
        ]
        bad += [f"grace_s={self.grace_s}"] * (self.grace_s < 0)
        bad += [f"port={self.port}"] * (not 0 <= self.port < 65536)
        if bad:
            raise ValueError(f"out of range: {', '.join(bad)}")
        if self.source == "all" and self.step is not None:
            raise ValueError(f"step={self.step} belongs to one stage: name it instead of all")


def main(config: Config) -> None:
    """Load each model once for every replica and serve."""
    logging.basicConfig(level=logging.WARNING, format=serve.LINES)
    logging.getLogger("jaxchat").setLevel(logging.INFO)
    found = stages(config)
    names = {stage: f"{stage}-{tag}" for stage, tag in found.items()}
    first, *others = found
    settings = server_settings(config, names[first])
    serve.check_address(config.host, config.port)
    engines = {stage: load_engines(config, stage, tag) for stage, tag in found.items()}
    place = "every address" if _everywhere(config.host) else config.host
    if config.host not in LOOPBACK and not settings.api_keys:
        print(f"warning: {place} is open to others and no API key is asked for", flush=True)
    app = create_app(engines[first], settings, {names[stage]: engines[stage] for stage in others})
    shown = ", ".join(names.values())
    serve.run(app, host=config.host, port=config.port, grace_s=config.grace_s, name=shown)


def stages(config: Config) -> dict[str, str]:
    """The model's tag for each stage to serve; the first one answers those who name no model."""
    if config.source != "all":
        return {config.source: config.model_tag or find_model_tag(config.source)}
    found = {}
    for stage in ("sft", "rl", "mid", "base"):
        if config.model_tag is not None:
            if CheckpointStore(stage_directory(stage, config.model_tag)).steps():
                found[stage] = config.model_tag
        else:
            with contextlib.suppress(FileNotFoundError):  # that stage has not been trained
                found[stage] = find_model_tag(stage)
    if not found:
        find_model_tag("base")  # says what to train, or that the tag is at fault
        raise FileNotFoundError(f"no stage has a model {config.model_tag}")
    return found


def load_engines(config: Config, stage: str, tag: str) -> list[Engine]:
    """One engine of a stage's model on each of the devices."""
    engines = []
    for device in range(config.replicas):
        model = load_model(
            stage, backend=config.backend, model_tag=tag, step=config.step, device=device
        )
        engines.append(
            Engine(
                model.backend,
                model.tokenizer,
                slots=config.slots,
                max_length=config.max_length,
                prefill_tokens=PREFILL_TOKENS,
                batch_invariant=config.batch_invariant,
            )
        )
    return engines


def server_settings(config: Config, model_name: str) -> ServerSettings:
    """What the server allows. A server that listens everywhere answers to any name, unless told."""
    hosts = (*LOOPBACK, config.host, *config.allowed_hosts)
    return ServerSettings(
        model_name=model_name,
        temperature=config.temperature,
        top_k=config.top_k,
        api_keys=read_keys(config.api_key_file),
        requests_per_minute=config.requests_per_minute,
        allowed_hosts=() if _everywhere(config.host) and not config.allowed_hosts else hosts,
        allowed_origins=config.allowed_origins,
        max_waiting=config.max_waiting,
        timeout_s=config.timeout_s,
    )


def read_keys(path: Path | None) -> tuple[str, ...]:
    """Keys from the file and from JAXCHAT_API_KEYS; ValueError where one of them holds none."""
    named = os.environ.get("JAXCHAT_API_KEYS")
    keys = [key.strip() for key in (named or "").split(",")]
    if named is not None and not any(keys):
        raise ValueError("JAXCHAT_API_KEYS is set and holds no API key: unset it to ask for none")
    if path is not None:
        lines = [line.strip() for line in path.read_text().splitlines()]
        if not any(lines):
            raise ValueError(f"{path} holds no API key: write one a line")
        keys += lines
    return tuple(key for key in keys if key)


def _everywhere(host: str) -> bool:
    return host in ("0.0.0.0", "::")


if __name__ == "__main__":
    cli.run(main, Config)
