"""The page's files and endpoint as any HTTP client sees them."""

import asyncio
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from jaxchat.server import page
from jaxchat.server.page import (
    CONTENT_SECURITY_POLICY,
    MAX_MARKDOWN_BYTES,
    MAX_MARKDOWN_TEXTS,
    PAGE_DIR,
    page_routes,
)
from tests.page.client import Client

JSON = {"Content-Type": "application/json"}
FILES = sorted(path.name for path in PAGE_DIR.iterdir())


@pytest.fixture(scope="module")
def client():
    return Client(Starlette(routes=page_routes()))


def test_every_file_is_served_with_its_type_and_a_strict_policy(client):
    types = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg"}
    for name in FILES:
        response = client.get("/" if name == "index.html" else f"/page/{name}")
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(types[name.rsplit(".", 1)[1]])
        assert response.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.content == (PAGE_DIR / name).read_bytes()


def test_the_policy_allows_nothing_inline_and_no_other_origin():
    directives = dict(part.split(" ", 1) for part in CONTENT_SECURITY_POLICY.split("; "))
    assert directives["default-src"] == "'none'"
    assert directives["script-src"] == directives["style-src"] == "'self'"
    assert "unsafe" not in CONTENT_SECURITY_POLICY and "http" not in CONTENT_SECURITY_POLICY


def test_what_did_not_change_is_not_sent_again(client):
    first = client.get("/page/main.js")
    again = client.get("/page/main.js", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304 and again.content == b""


def test_a_tag_that_a_zipping_proxy_has_made_weak_is_known(client):
    tag = client.get("/page/main.js").headers["etag"]
    for known in (f"W/{tag}", f'"other", {tag}'):
        assert client.get("/page/main.js", headers={"If-None-Match": known}).status_code == 304
    assert client.get("/page/main.js", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    ("prefix", "named"),
    [
        ("/user/x%20y/proxy/8000", '<script src="/user/x%20y/proxy/8000/page/slash.js">'),
        ("/chat/", '<script src="/chat/page/slash.js">'),
        ("", None),
        ("/", None),
        ("//evil.example", None),
        ("/a/..//evil.example", None),
        ("https://evil.example", None),
        ('/"><script>window.hacked = 1</script>', None),
        ("/a, /b", None),
    ],
)
def test_a_prefix_is_used_where_it_is_a_path_and_nothing_else(client, prefix, named):
    page = client.get("/", headers={"X-Forwarded-Prefix": prefix}).text
    assert ("slash.js" in page) == bool(named)
    assert (named or "") in page and "evil" not in page and "hacked" not in page
    assert (page == client.get("/").text) == (named is None)


@pytest.mark.parametrize(
    "path", ["/page/../page.py", "/page/%2e%2e/page.py", "/page/..%2fpage.py", "/page/", "/page/x"]
)
def test_nothing_else_is_served(client, path):
    assert client.get(path).status_code == 404


def test_no_file_names_another_origin():
    for name in FILES:
        text = (PAGE_DIR / name).read_text()
        code = re.sub(r"/\*.*?\*/|<!--.*?-->|^\s*//.*$", "", text, flags=re.DOTALL | re.MULTILINE)
        urls = set(re.findall(r"https?://[^\s\"')]+", code))
        assert urls <= {"http://www.w3.org/2000/svg"}, f"{name}: {urls}"


def test_every_import_and_link_names_a_file_that_is_there():
    for name in FILES:
        text = (PAGE_DIR / name).read_text()
        for target in re.findall(r'(?:from "\./|(?:href|src)="page/)([^"]+)"', text):
            assert target in FILES, f"{name} names {target}"


def test_only_one_module_makes_markup_of_text():
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|DOMParser|srcdoc"
    guilty = {name for name in FILES if re.search(sinks, (PAGE_DIR / name).read_text())}
    assert guilty == {"markdown.js"}


def test_markdown_comes_back_in_order(client):
    response = client.post("/page/markdown", json={"texts": ["*a*", "", "`b`"]})
    assert response.json() == {"html": ["<p><em>a</em></p>\n", "", "<p><code>b</code></p>\n"]}
    assert response.headers["content-security-policy"] == CONTENT_SECURITY_POLICY


def test_few_requests_wait_to_be_rendered_and_the_rest_is_sent_away(monkeypatch):
    """Nobody is asked for a key: memory grew with every request, its client gone or not."""
    go = threading.Event()
    monkeypatch.setattr(page, "render_all", lambda texts: go.wait(30) and texts)
    transport = httpx.ASGITransport(app=Starlette(routes=page_routes()))
    places = page.RENDER_THREADS + page.MAX_WAITING

    async def ask():
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            post = partial(client.post, "/page/markdown", json={"texts": ["x"]})
            asked = [asyncio.ensure_future(post()) for _ in range(places + 5)]
            try:
                async with asyncio.timeout(20):
                    answers = [await one for one in islice(asyncio.as_completed(asked), 5)]
            finally:
                go.set()
            return answers, [one.status_code for one in await asyncio.gather(*asked)]

    with ThreadPoolExecutor(1) as thread:  # playwright has an event loop in this one
        refused, statuses = thread.submit(lambda: asyncio.run(ask())).result()
    assert [one.json()["error"]["type"] for one in refused] == ["overloaded_error"] * 5
    assert (statuses.count(503), statuses.count(200)) == (5, places)


@pytest.mark.parametrize(
    ("content", "status", "named"),
    [
        (b"", 400, "Expecting value"),
        (b"[]", 400, "texts"),
        (b'{"texts": "x"}', 400, "texts"),
        (b'{"texts": [1]}', 400, "texts"),
        (b'{"texts": ["\xff"]}', 400, "utf-8"),
        (b'{"texts": [' + b",".join([b'""'] * (MAX_MARKDOWN_TEXTS + 1)) + b"]}", 400, "65 texts"),
        (b'"' + b"x" * MAX_MARKDOWN_BYTES + b'"', 413, str(MAX_MARKDOWN_BYTES)),
        (b"[" * 100_000, 400, "nested"),
    ],
    ids=["empty", "list", "no list", "numbers", "bytes", "too many", "too large", "too deep"],
)
def test_a_bad_request_is_refused_with_its_reason(client, content, status, named):
    response = client.post("/page/markdown", content=content, headers=JSON)
    assert response.status_code == status
    assert named in response.json()["error"]["message"]


def test_what_another_site_can_send_is_refused(client):
    body = b'{"texts": ["a"]}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = client.post("/page/markdown", content=body, headers={"Content-Type": kind})
        assert response.status_code == 415
    with_charset = {"Content-Type": "application/json; charset=utf-8"}
    assert client.post("/page/markdown", content=body, headers=with_charset).status_code == 200


def test_half_a_surrogate_pair_is_no_reason_to_fail(client):
    response = client.post("/page/markdown", content=b'{"texts": ["a\\ud800b"]}', headers=JSON)
    assert response.status_code == 200 and response.json()["html"] == ["<p>a\ufffdb</p>\n"]


def test_the_routes_fit_into_a_bigger_application():
    async def other(scope, receive, send): ...

    app = Starlette(routes=[Route("/v1/models", other), *page_routes()])
    assert Client(app).get("/").status_code == 200
