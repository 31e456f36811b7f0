"""A real server for tests: a tiny model on the JAX backend, uvicorn on loopback, in a thread."""

import asyncio
import contextlib
import threading
import time
from dataclasses import replace
from functools import cache

import httpx
import numpy as np

from jaxchat.engine import Engine
from jaxchat.jax_backend import JaxBackend
from jaxchat.server.app import create_app
from jaxchat.server.serve import make_server
from jaxchat.server.settings import ServerSettings
from jaxchat.tokenizer import Tokenizer
from tests.models import MODERN

MODEL = "tiny"
CONTEXT = 128
SLOTS = 4
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Wie schön, señor: ünïcödé 你好, 12*3 = 36 and 7+8 = 15.",
] * 4


@cache
def tokenizer():
    return Tokenizer.train(TEXTS, vocab_size=300)


@cache
def backend(device=0):
    """Two layers, every weight perturbed; the softmax sharp enough that greedy text varies."""
    config = replace(MODERN, n_layer=2, sequence_len=CONTEXT, vocab_size=tokenizer().vocab_size)
    made = JaxBackend(config, device=device)
    made.init(0)
    rng, params = np.random.default_rng(0), made.get_params()
    for name in sorted(params):
        params[name] = params[name] + rng.normal(0, 0.1, params[name].shape).astype(np.float32)
    made.set_params(params)
    return made


def make_engine(device=0, *, slots=SLOTS):
    return Engine(backend(device), tokenizer(), slots=slots, tokens_per_dispatch=4)


class RunningServer:
    """A server that answers at `url`."""

    def __init__(self, app, url):
        self.app, self.url = app, url
        self.service = next(iter(app.state.services.values()))
        self.pool = self.service.pool
        self.engine = self.pool.workers[0].engine

    def get(self, path, **options):
        return httpx.get(self.url + path, timeout=60, **options)

    def post(self, path, body, **options):
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def wait_idle(self, seconds=10.0):
        """Until nothing is under way in any engine."""
        deadline = time.monotonic() + seconds
        pools = [service.pool for service in self.app.state.services.values()]
        workers = [worker for pool in pools for worker in pool.workers]
        while any(w.load or w.engine.busy or w._streams for w in workers):
            assert time.monotonic() < deadline, "a slot was not freed"
            time.sleep(0.01)


@contextlib.contextmanager
def running(engines=None, *, others=None, ready=True, **settings):
    """A server until the block ends; `ready` waits for the warm-up."""
    app = create_app(engines or [make_engine()], ServerSettings(MODEL, **settings), others)
    server = make_server(app, host="127.0.0.1", port=0, grace_s=5)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        one = RunningServer(app, f"http://127.0.0.1:{port}")
        while ready and not all(other.pool.ready for other in app.state.services.values()):
            assert not one.pool.workers[0].failed
            time.sleep(0.01)
        yield one
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
