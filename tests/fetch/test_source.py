"""What may be typed as a source, and what may not."""

from __future__ import annotations

import pytest

from ai_assistant.daemon.fetch.source import HubSource, UrlSource, check_url, from_dict, key, origin, parse, to_dict
from ai_assistant.errors import InvalidArgument

HUB = "https://hub.example"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf:owner/name", ("owner", "name", "", "main")),
        ("hf:owner/name:Q4_K_M", ("owner", "name", "Q4_K_M", "main")),
        ("hf:owner/na.me-1:sub/dir/a b.gguf@v1.0", ("owner", "na.me-1", "sub/dir/a b.gguf", "v1.0")),
        ("hf:owner/name@refs/pr/3", ("owner", "name", "", "refs/pr/3")),
    ],
)
def test_hub_sources(text: str, parts: tuple[str, str, str, str]) -> None:
    source = parse(text, endpoint=HUB + "/")
    assert isinstance(source, HubSource)
    assert (source.owner, source.repository, source.selector, source.revision) == parts
    assert source.shown == text
    assert source.listing_url.startswith(f"{HUB}/api/models/{parts[0]}/{parts[1]}/revision/")
    assert from_dict(to_dict(source), allow_http=False) == source


def test_addresses_are_quoted() -> None:
    source = parse("hf:o/n@refs/pr/3", endpoint=HUB)
    assert isinstance(source, HubSource)
    assert source.listing_url.endswith("/revision/refs%2Fpr%2F3")
    assert source.file_url("a b/c?d#e.gguf", "abc") == f"{HUB}/o/n/resolve/abc/a%20b/c%3Fd%23e.gguf"


def test_urls() -> None:
    source = parse("https://host.example/a/m.gguf?signature=secret#part", endpoint=HUB)
    assert isinstance(source, UrlSource)
    assert source.url == "https://host.example/a/m.gguf?signature=secret"
    assert "secret" not in source.shown
    assert from_dict(to_dict(source), allow_http=False) == source


@pytest.mark.parametrize(
    "text",
    [
        "", "name", "owner/name", "/etc/passwd", "file:///etc/passwd", "ftp://h/x", "hf:", "hf:owner", "hf:/name",
        "hf:o/", "hf:o/n/x", "hf:../n", "hf:o/..", "hf:o/n:", "hf:o/n:../x", "hf:o/n:/etc/passwd", "hf:o/n:a//b",
        "hf:o/n:a\\b", "hf:o/n:a\nb", "hf:o/n:" + "x" * 2000, "hf:o/n@", "hf:o/n@../x", "hf:o/n@a b", "hf:o/n@-x",
        "hf:o n/x", "hf:o/n\x00", "https://", "https:///x", "https://user:password@host/x", "https://user@host/x", "http://host/x",
        "https://host/a b", "https://host/\x1b[31m", "https://host:port/x", "https://[::1/x", "https://hö.example/x",
        "h" * 5000,
    ],
)  # fmt: skip
def test_what_is_no_source(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse(text, endpoint=HUB)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9:8080", "localhost:1", "[::1]:8080", "hub.localhost"])
def test_http_stays_on_this_machine(host: str) -> None:
    assert check_url(f"http://{host}/x", allow_http=False)
    parse("hf:o/n", endpoint=f"http://{host}")


@pytest.mark.parametrize(
    "host", ["example.com", "127.0.0.1.example.com", "192.168.1.2", "0.0.0.0", "localhost.example"]
)
def test_http_to_others_must_be_allowed(host: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_url(f"http://{host}/x", allow_http=False)
    assert "pull.allow_http" in caught.value.hint
    assert check_url(f"http://{host}/x", allow_http=True)
    with pytest.raises(InvalidArgument):
        parse("hf:o/n", endpoint=f"http://{host}")


def test_who_gets_the_token() -> None:
    assert origin("https://h.example/x") == origin("https://H.example:443/y")
    assert origin("https://h.example/x") != origin("http://h.example/x")
    assert origin("https://h.example/x") != origin("https://h.example:8443/x")


def test_one_wish_has_one_key() -> None:
    wishes = ["hf:o/n", "hf:o/n:Q8_0", "hf:o/n@v2", "hf:o/m", "https://h.example/x", "https://h.example/y"]
    assert len({key(parse(each, endpoint=HUB)) for each in wishes}) == len(wishes)
    assert key(parse("hf:o/n", endpoint=HUB)) == key(parse("hf:o/n@main", endpoint=HUB + "/"))
    assert key(parse("hf:o/n", endpoint=HUB)) != key(parse("hf:o/n", endpoint="https://other.example"))


@pytest.mark.parametrize(
    "values",
    [None, 3, [], {}, {"kind": "url"}, {"kind": "url", "url": 3}, {"kind": "url", "url": "file:///x"},
     {"kind": "hub", "endpoint": HUB}, {"kind": "hub", "endpoint": "ftp://h", "owner": "o", "repository": "n"}],
)  # fmt: skip
def test_strange_messages(values: object) -> None:
    with pytest.raises(InvalidArgument):
        from_dict(values, allow_http=False)
