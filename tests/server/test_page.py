"""The page: who gets it, with which headers, and that it holds what these headers allow, and no more."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files

import shoal
from shoal.server.app import Options
from shoal.server.opening import LOCAL_HOSTS
from shoal.server.page import assembled

from .conftest import Serving, serving

PAGE = assembled()


def policy_of(served: Serving) -> dict[str, list[str]]:
    with served.client as client:
        told = client.get("/").headers["content-security-policy"]
    return {rule.split()[0]: rule.split()[1:] for rule in told.split("; ")}


def test_the_page_is_whole_and_is_sent_once(served: Serving) -> None:
    with served.client as client:
        reply = client.get("/")
        assert reply.content == PAGE
        assert reply.headers["content-type"] == "text/html; charset=utf-8"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "no-referrer"
        tag = reply.headers["etag"]
        for known, status in ((tag, 304), (f'"x", W/{tag}', 304), ('"x"', 200)):
            again = client.get("/", headers={"If-None-Match": known})
            assert again.status_code == status and bool(again.content) == (status == 200), known
        head = client.head("/")
        assert (head.status_code, head.content) == (200, b"")
        assert client.post("/", json={}).status_code == 405


def test_the_page_has_every_file_of_its_directory_once() -> None:
    parts = {file.name: file.read_bytes() for file in files("shoal").joinpath("page").iterdir()}
    shell = parts.pop("index.html")
    assert sorted({name.rsplit(".")[-1] for name in parts}) == ["css", "js"]
    for name, text in parts.items():
        assert PAGE.count(text) == 1, name
    added = b'"use strict";\n' + b"\n" * (len(parts) - 2)
    assert len(PAGE) == len(shell) + sum(map(len, parts.values())) + len(added)
    assert b"<link rel=stylesheet" not in PAGE and b"src=" not in PAGE


def test_only_what_is_in_the_page_runs(served: Serving) -> None:
    policy = policy_of(served)
    for kind in ("script", "style"):
        (body,) = re.findall(f"<{kind}>(.*?)</{kind}>".encode(), PAGE, re.DOTALL)
        assert policy[f"{kind}-src"] == [f"'sha256-{b64encode(sha256(body).digest()).decode()}'"]
    for what in ("default-src", "frame-ancestors", "base-uri", "form-action", "trusted-types"):
        assert policy[what] == ["'none'"]
    assert policy["connect-src"] == ["'self'"] and policy["img-src"] == ["data:"]
    text = PAGE.decode()
    addresses = set(re.findall(r"""https?://[^\s"'`)\\]+""", text)) - {"http://www.w3.org/2000/svg"}
    assert addresses == set(), "the page names no other server"
    assert not re.search(
        r"""innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\sstyle=|\son\w+=""", text
    )


def test_the_page_needs_no_key_and_the_right_host(llm: shoal.LLM) -> None:
    keys = {sha256(b"sesame-sesame-sesame").digest(): "ali"}
    with serving(llm, Options(keys=keys, hosts=LOCAL_HOSTS)) as guarded, guarded.client as client:
        assert client.get("/").status_code == 200
        assert client.get("/v1/models").status_code == 401
        assert client.get("/", headers={"Host": "shoal.example"}).status_code == 421
        assert client.get("/", headers={"Origin": "https://elsewhere.example"}).status_code == 403
