"""A server for the tests of a file."""

import time

import pytest

from tests.servers import running


@pytest.fixture(scope="module")
def server():
    with running() as one:
        yield one


@pytest.fixture
def idle(server):
    """The server, checked to have nothing under way before and after."""
    server.wait_idle()
    yield server
    server.wait_idle()


@pytest.fixture
def slow(idle, monkeypatch):
    """The server with an engine that takes 20 ms longer for a step."""
    step = idle.engine.step

    def slow_step():
        time.sleep(0.02)
        return step()

    monkeypatch.setattr(idle.engine, "step", slow_step)
    return idle
