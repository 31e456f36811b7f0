"""A real server for tests: a tiny model, uvicorn on loopback, in a thread or in a process."""

import asyncio
import contextlib
import os
import socket
import subprocess
import threading
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import httpx
import torch

from jaxchat.engine import Engine
from jaxchat.jax_backend import JaxBackend
from jaxchat.server.app import create_app
from jaxchat.server.serve import make_server
from jaxchat.server.settings import ServerSettings
from jaxchat.tokenizer import Tokenizer
from tests.models import MODERN, shaken
from torch_ref.torch_backend import TorchBackend

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
    made.set_params(shaken(made.get_params()))
    return made


@cache
def torch_backend():
    """The same model in torch; more threads than one would only wait for each other."""
    torch.set_num_threads(1)
    made = TorchBackend(backend().config)
    made.set_params(backend().get_params())
    return made


def make_engine(model=None):
    return Engine(model or backend(), tokenizer(), slots=SLOTS, tokens_per_dispatch=4)


class RunningServer:
    """A server that answers at `url`."""

    def __init__(self, app, url, server):
        self.app, self.url, self.server = app, url, server
        self.service = next(iter(app.state.services.values()))
        self.pool = self.service.pool
        self.engine = self.pool.workers[0].engine

    def connect(self, sent=b""):
        """A connection on which these bytes have been sent."""
        port = int(self.url.rsplit(":", 1)[1])
        connection = socket.create_connection(("127.0.0.1", port), timeout=20)
        connection.sendall(sent)
        return connection

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
def running(engines=None, *, others=None, ready=True, grace_s=5, **settings):
    """A server until the block ends; `ready` waits for the warm-up."""
    app = create_app(engines or [make_engine()], ServerSettings(MODEL, **settings), others)
    server = make_server(app, host="127.0.0.1", port=0, grace_s=grace_s)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        one = RunningServer(app, f"http://127.0.0.1:{port}", server)
        while ready and not all(other.pool.ready for other in app.state.services.values()):
            assert not one.pool.workers[0].failed
            time.sleep(0.01)
        yield one
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


class Process:
    """A server in a process of its own; `command` gets its port as the last argument."""

    def __init__(self, command, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [*command, str(port)],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},  # as in torch_backend
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.signal, self.wait = self._process.send_signal, self._process.wait

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self.output = self._process.communicate()[0]

    def wait_ready(self, seconds=120.0):
        deadline = time.monotonic() + seconds
        while True:
            assert self._process.poll() is None, self._process.stdout.read()
            assert time.monotonic() < deadline
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.url + "/ready").status_code == 200:
                    return
            time.sleep(0.02)

    @property
    def load(self):
        return httpx.get(self.url + "/stats").json()["workers"][0]["load"]
