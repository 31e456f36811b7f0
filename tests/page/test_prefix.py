"""The page and the API below a path of a proxy: nothing is asked for beside that path.

The server is the product's own with a tiny model, every layer of it; the proxy is a real one.
"""

import json
import threading
from urllib.parse import urljoin

import httpx
import openai
import pytest
from playwright.sync_api import expect

from jaxchat.server import sse
from tests.page.app_thread import DEADLINE_S
from tests.page.conftest import Chat, new_context
from tests.page.prefix_proxy import PrefixProxy
from tests.servers import MODEL, make_engine, running


class Proxied:
    """The server behind a proxy, as `Chat` knows a server."""

    def __init__(self, one, proxy, url):
        self.one, self.url, self.proxy = one, url, proxy


@pytest.fixture(scope="module")
def engine():
    return make_engine()


@pytest.fixture(scope="module", params=["/chat/", "/user/x/proxy/8000/"])
def proxied(request, engine):
    with running([engine]) as one, PrefixProxy(one.url, request.param, tells=False) as proxy:
        yield Proxied(one, proxy, proxy.url + request.param)
        one.wait_idle()
    assert set(proxy.strays) <= {"/favicon.ico"}


@pytest.fixture
def chat(browser, proxied):
    context = new_context(browser, accept_downloads=True)
    chat = Chat.open(context, proxied, path=proxied.url)
    yield chat
    context.close()
    assert chat.problems == []
    assert [url for url in chat.requested if not url.startswith((proxied.url, "blob:"))] == []


def set_longest_answer(chat, tokens):
    """And let the answer always be the same."""
    chat.button("Settings").click()
    chat.page.get_by_label("Longest answer", exact=True).fill(str(tokens))
    chat.page.get_by_label("Temperature", exact=True).fill("0")
    chat.button("Done").click()


def test_models_settings_chat_and_exports(chat, proxied):
    expect(chat.page.locator("#model-name")).to_have_text(MODEL)
    chat.button("Settings").click()
    expect(chat.page.get_by_label("Top-k", exact=True)).to_have_value("50")  # what the server told
    chat.button("Done").click()
    set_longest_answer(chat, 12)
    chat.say("hello")
    expect(chat.answers.last.locator(".stats")).to_contain_text("tokens/s")
    expect(chat.page.locator(".prose.plain")).to_have_count(0)  # the server's Markdown came
    chat.page.locator("#export-menu summary").click()
    with chat.page.expect_download() as download:
        chat.button("JSON, with every branch").click()
    assert json.loads(download.value.path().read_text())["conversations"]


def test_a_conversation_has_its_own_address_and_is_found_there_again(chat, proxied):
    set_longest_answer(chat, 5)
    chat.say("hello")
    expect(chat.answers.last.locator(".stats")).to_be_visible()
    address = chat.address
    assert address.startswith(proxied.url + "#")
    chat.button("New chat").click()
    chat.wait_for("location.hash === ''")
    assert chat.address == proxied.url
    chat.go_to(address)
    chat.reload()
    expect(chat.answers).to_have_count(1)


def test_an_answer_grows_while_it_comes(chat, proxied, monkeypatch):
    steps, step = threading.Semaphore(2), proxied.one.engine.step
    monkeypatch.setattr(
        proxied.one.engine, "step", lambda: (steps.acquire(timeout=DEADLINE_S) and step()) or []
    )
    set_longest_answer(chat, 12)
    chat.say("hello", wait=False)
    expect(chat.answers.last.locator(".prose")).not_to_be_empty()
    expect(chat.button("Stop")).to_be_visible()
    steps.release(100)
    chat.wait_until_finished()
    proxied.one.wait_idle()


def test_an_answer_that_waits_is_kept_alive_and_can_be_stopped(chat, proxied, monkeypatch):
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.05)
    go, step = threading.Event(), proxied.one.engine.step
    monkeypatch.setattr(proxied.one.engine, "step", lambda: (go.wait(DEADLINE_S) and step()) or [])
    set_longest_answer(chat, 5)
    for stopped in (True, False):
        go.clear()
        chat.say("hello", wait=False)
        expect(chat.button("Stop")).to_be_visible()
        signs = proxied.proxy.signs_of_life
        chat.wait_until(lambda n=signs: proxied.proxy.signs_of_life >= n + 5, "signs of life")
        if stopped:
            chat.button("Stop").click()
        go.set()
        chat.wait_until_finished()
        proxied.one.wait_idle()
        expect(chat.answers.last.get_by_role("group", name="Error")).to_have_count(0)
        expect(chat.answers.last.get_by_text("Stopped.")).to_have_count(int(stopped))


@pytest.mark.parametrize("tells", [True, False])
def test_an_address_without_its_slash_gets_it_or_is_explained(browser, engine, tells):
    """jupyter-server-proxy does not redirect, but tells its prefix."""
    with running([engine]) as one, PrefixProxy(one.url, "/proxy/8000/", tells=tells) as proxy:
        page = browser.new_page()
        page.goto(proxy.url + "/proxy/8000?token=x")
        explained = page.get_by_text("does its address end with a slash?")
        if tells:
            expect(page.locator("#model-name")).to_have_text(MODEL)
            assert page.url == proxy.url + "/proxy/8000/?token=x"
        else:
            expect(explained).to_be_visible()
            page.goto(proxy.url + "/proxy/8000/")
        expect(explained).to_be_hidden()
        page.close()


def test_openais_client_and_the_schema_find_the_server_below_its_path(proxied, monkeypatch):
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.01)
    with openai.OpenAI(base_url=f"{proxied.url}v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        stream = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hello"}], stream=True, max_tokens=9
        )
        assert [chunk.choices[0].finish_reason for chunk in stream][-1]
    address = proxied.url + "openapi.json"
    (server,) = httpx.get(address).json()["servers"]
    assert urljoin(address, server["url"]) == proxied.url
    answer = httpx.get(proxied.url + "v1/models/")  # a redirect would name another address
    assert answer.status_code == 200 and answer.json()["data"][0]["id"] == MODEL
