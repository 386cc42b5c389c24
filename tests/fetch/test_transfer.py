"""One file over a line that fails in every way there is."""

from __future__ import annotations

import hashlib
import os
import ssl
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from ai_assistant.daemon.fetch.transfer import Fetched, Patience, Want, transfer
from ai_assistant.daemon.fetch.web import Web
from ai_assistant.errors import DownloadFailed, NoSpace, NoSuchModel, NotAuthorized
from tests.support import hub_server
from tests.support.hub_server import Hub

CONTENT = bytes(index * 7 % 251 for index in range(300_000))
SHA256 = hashlib.sha256(CONTENT).hexdigest()
QUICK = Patience(attempts=4, first_wait_s=0.0, longest_wait_s=0.0, stall_s=20.0)
HASTY = Patience(attempts=8, first_wait_s=0.0, longest_wait_s=0.0, stall_s=0.5)


class Line:
    """A file to fill, and what was told of it."""

    def __init__(self, hub: Hub, path: Path) -> None:
        self.hub = hub
        self.path = path
        self.told: list[dict[str, Any]] = []
        self.slept: list[float] = []
        hub.files["o/n"] = {"m.gguf": CONTENT}

    @property
    def url(self) -> str:
        return f"{self.hub.url}/o/n/resolve/main/m.gguf"

    def fetch(
        self, *, token: str = "", patience: Patience = QUICK, url: str = "", size: int = len(CONTENT),
        sha256: str = SHA256, **want: Any
    ) -> Fetched:  # fmt: skip
        web = Web(self.url, token=token, silence_s=patience.stall_s)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            wanted = Want(url=url or self.url, size_bytes=size, sha256=sha256, **want)
            return transfer(web, wanted, fd, self.told.append, patience, sleep=self.slept.append)
        finally:
            os.close(fd)
            web.close()

    @property
    def ranges(self) -> list[str]:
        """What the requests asked for, in order."""
        return [each.headers.get("Range", "") for each in self.hub.bodies() if each.host == "hub"]


@pytest.fixture
def line(hub: Hub, tmp_path: Path) -> Line:
    return Line(hub, tmp_path / "part")


def test_a_whole_file(line: Line) -> None:
    assert line.fetch() == Fetched(len(CONTENT), SHA256)
    assert line.path.read_bytes() == CONTENT
    assert line.ranges == [""]
    assert line.told[-1] == {"bytes": len(CONTENT), "total": len(CONTENT)}


def test_an_earlier_part_is_continued(line: Line) -> None:
    line.path.write_bytes(CONTENT[:100_000])
    assert line.fetch().sha256 == SHA256
    assert line.ranges == ["bytes=100000-"]
    assert line.path.read_bytes() == CONTENT


def test_a_complete_part_needs_no_network(line: Line) -> None:
    line.path.write_bytes(CONTENT)
    assert line.fetch().sha256 == SHA256
    assert line.hub.seen == []


def test_dropped_connections_are_continued(line: Line) -> None:
    line.hub.faults.extend([hub_server.drop_after(70_000), hub_server.drop_after(10), hub_server.drop_after(100_000)])
    assert line.fetch().sha256 == SHA256
    assert line.ranges == ["", "bytes=70000-", "bytes=70010-", "bytes=170010-"]
    assert len(line.slept) == 3
    assert [each["retry"] for each in line.told if "retry" in each]


def test_it_gives_up_and_keeps_what_came(line: Line) -> None:
    line.hub.faults.extend([hub_server.drop_after(50_000), *[hub_server.status(503)] * 8])
    with pytest.raises(DownloadFailed, match="503") as caught:
        line.fetch()
    assert "goes on where it stopped" in caught.value.hint
    assert line.path.stat().st_size == 50_000
    line.hub.faults.clear()
    assert line.fetch().sha256 == SHA256
    assert line.ranges[-1] == "bytes=50000-"


def test_waits_grow(line: Line) -> None:
    line.hub.faults.extend([hub_server.status(500)] * 4)
    patience = Patience(attempts=5, first_wait_s=1.0, longest_wait_s=3.0, stall_s=20.0)
    line.fetch(patience=patience)
    assert [0.8 * wait <= slept <= 1.2 * wait for wait, slept in zip((1, 2, 3, 3), line.slept, strict=True)] == [
        True
    ] * 4


def test_a_server_that_ignores_ranges(line: Line) -> None:
    line.path.write_bytes(CONTENT[:100_000])
    line.hub.faults.append(hub_server.ignore_range)
    assert line.fetch().sha256 == SHA256
    assert line.path.read_bytes() == CONTENT


def test_a_server_that_sends_another_range(line: Line) -> None:
    line.path.write_bytes(CONTENT[:100_000])
    line.hub.faults.append(hub_server.other_range)
    assert line.fetch().sha256 == SHA256
    assert line.ranges == ["bytes=100000-", ""]


def test_a_part_of_another_file_is_begun_anew_once(line: Line) -> None:
    line.path.write_bytes(b"x" * 100_000)
    assert line.fetch().sha256 == SHA256
    assert line.ranges == ["bytes=100000-", ""]
    line.path.write_bytes(b"x" * len(CONTENT))
    assert line.fetch().sha256 == SHA256
    line.path.write_bytes(CONTENT + b"longer than it can be")
    assert line.fetch().sha256 == SHA256


def test_a_wrong_hash_leaves_nothing(line: Line) -> None:
    with pytest.raises(DownloadFailed, match="hash is") as caught:
        line.fetch(sha256="0" * 64)
    assert "nothing of it was kept" in caught.value.hint
    assert line.path.stat().st_size == 0
    assert line.ranges == [""]


def test_gits_hash_of_a_small_file(line: Line) -> None:
    right = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()
    assert line.fetch(sha256="", git_sha1=right).sha256 == SHA256
    line.path.unlink()
    with pytest.raises(DownloadFailed, match="git hash"):
        line.fetch(sha256="", git_sha1="1" * 40)


def test_the_hash_that_a_hub_links_to(line: Line) -> None:
    line.hub.store = True
    line.hub.lies["m.gguf"] = "2" * 64
    with pytest.raises(DownloadFailed, match="2222"):
        line.fetch(sha256="")


def test_a_wrong_length(line: Line) -> None:
    line.hub.faults.append(hub_server.wrong_length)
    with pytest.raises(DownloadFailed, match=f"sends {len(CONTENT) - 1} bytes, but the file has {len(CONTENT)}"):
        line.fetch()


def test_without_size_and_hash_only_a_validator_proves_a_part(line: Line) -> None:
    line.path.write_bytes(CONTENT[:1000])
    line.fetch(size=-1, sha256="")
    assert line.ranges == [""]
    etag = next(each["validator"] for each in line.told if "validator" in each)
    line.path.write_bytes(CONTENT[:1000])
    line.fetch(size=-1, sha256="", validator=etag)
    assert line.ranges[1:] == ["bytes=1000-"]
    assert line.hub.seen[-1].headers["If-Range"] == etag
    line.path.write_bytes(b"z" * 1000)
    line.fetch(size=-1, sha256="", validator='"of another version"')
    assert line.path.read_bytes() == CONTENT


def test_an_endless_body_ends_at_the_room_there_is(line: Line) -> None:
    line.hub.faults.append(hub_server.endless)
    with pytest.raises(NoSpace, match="larger than 500000 bytes"):
        line.fetch(size=-1, sha256="", max_bytes=500_000)
    assert line.path.stat().st_size <= 500_000
    line.hub.faults.append(hub_server.endless)
    with pytest.raises(DownloadFailed, match="more than the 300000 bytes"):
        line.fetch()


def test_a_file_that_is_too_large_is_not_begun(line: Line) -> None:
    with pytest.raises(NoSpace, match=f"has {len(CONTENT)} bytes; there is room for 1000"):
        line.fetch(max_bytes=1000)
    assert line.path.stat().st_size == 0


def test_compressed_bodies_are_refused(line: Line) -> None:
    line.hub.faults.append(hub_server.compressed)
    with pytest.raises(DownloadFailed, match="compressed"):
        line.fetch()
    assert all(each.headers["Accept-Encoding"] == "identity" for each in line.hub.seen)


@pytest.mark.parametrize("fault", [hub_server.drip, hub_server.silence])
def test_standing_still_is_a_failure(line: Line, fault: hub_server.Fault) -> None:
    line.hub.faults.append(fault)
    assert line.fetch(patience=HASTY).sha256 == SHA256
    assert len(line.ranges) >= 2
    assert line.ranges[1].startswith("bytes=")


def test_the_server_says_how_long_to_wait(line: Line) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    line.hub.faults.extend([
        hub_server.status(429, {"Retry-After": "7"}),
        hub_server.status(503, {"Retry-After": later}),
        hub_server.status(429, {"Retry-After": "soon, perhaps"}),
    ])  # fmt: skip
    assert line.fetch().sha256 == SHA256
    assert line.slept[0] == 7.0
    assert 20 < line.slept[1] <= 30
    assert line.slept[2] == 0.0
    line.path.unlink()
    line.hub.faults.append(hub_server.status(429, {"Retry-After": "86400"}))
    with pytest.raises(DownloadFailed, match="too many requests") as caught:
        line.fetch()
    assert "86400 s" in caught.value.hint


@pytest.mark.parametrize(
    ("code", "error"), [(404, NoSuchModel), (410, NoSuchModel), (401, NotAuthorized), (403, NotAuthorized),
                        (400, DownloadFailed), (451, DownloadFailed)]
)  # fmt: skip
def test_what_does_not_get_better_is_not_asked_again(line: Line, code: int, error: type[Exception]) -> None:
    line.hub.faults.append(hub_server.status(code))
    with pytest.raises(error):
        line.fetch()
    assert line.slept == []


def test_the_token_stays_with_its_host(line: Line) -> None:
    line.hub.token = "hf_secret"
    line.hub.store = True
    assert line.fetch(token="hf_secret").sha256 == SHA256
    assert [(each.host, each.headers.get("Authorization")) for each in line.hub.bodies()] == [
        ("hub", "Bearer hf_secret"),
        ("store", None),
    ]
    assert "hf_secret" not in str(line.told)


def test_the_token_does_not_come_back_with_a_redirect(line: Line) -> None:
    line.hub.store = True
    line.hub.faults.append(hub_server.redirect(f"{line.hub.url}/o/n/resolve/main/other.gguf"))
    with pytest.raises(NoSuchModel):
        line.fetch(token="hf_secret")
    assert [(each.host, each.headers.get("Authorization"), each.headers.get("Cookie")) for each in line.hub.seen] == [
        ("hub", "Bearer hf_secret", None),
        ("store", None, None),
        ("hub", None, None),
    ]


def test_permission_is_named(line: Line) -> None:
    line.hub.token = "right"
    with pytest.raises(NotAuthorized) as caught:
        line.fetch()
    assert "--token-file" in caught.value.hint
    with pytest.raises(NotAuthorized) as caught:
        line.fetch(token="wrong")
    assert "is the token right" in caught.value.hint


@pytest.mark.parametrize(
    "target",
    ["http://192.0.2.1/x", "ftp://192.0.2.1/x", "file:///etc/passwd", "https://user:secret@192.0.2.1/", "",
     "https://" + "a" * 9000, "http://[::1/"],
)  # fmt: skip
def test_redirects_to_nowhere(line: Line, target: str) -> None:
    line.hub.faults.extend([hub_server.redirect(target)] * 4)
    with pytest.raises(DownloadFailed, match=r"redirects to an unusable address|Invalid URL in location") as caught:
        line.fetch()
    assert "secret" not in caught.value.message


def test_redirects_in_a_circle(line: Line) -> None:
    line.hub.faults.extend([hub_server.redirect("m.gguf")] * 20)
    with pytest.raises(DownloadFailed, match="more than 8 redirects"):
        line.fetch()


def test_nobody_listens(line: Line) -> None:
    with pytest.raises(DownloadFailed, match="Connection refused") as caught:
        line.fetch(url="http://127.0.0.1:1/m.gguf")
    assert "network" in caught.value.hint
    assert len(line.slept) == 3


def test_a_name_that_is_none(line: Line) -> None:
    with pytest.raises(DownloadFailed, match="cannot be resolved"):
        line.fetch(url="https://no-such-host.invalid/m.gguf")


def test_a_full_disk(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def full(fd: int, data: Any, offset: int) -> int:
        if offset >= 100_000:
            raise OSError(28, "No space left on device")
        return real(fd, bytes(data)[: 100_000 - offset], offset)

    monkeypatch.setattr("ai_assistant.daemon.fetch.transfer.os.pwrite", full)
    with pytest.raises(NoSpace, match="disk is full"):
        line.fetch()
    assert line.path.stat().st_size == 100_000


def test_an_empty_file(line: Line) -> None:
    line.hub.files["o/n"]["m.gguf"] = b""
    empty = hashlib.sha256(b"").hexdigest()
    assert line.fetch(size=0, sha256=empty) == Fetched(0, empty)
    assert line.fetch(size=-1, sha256="") == Fetched(0, empty)


def test_a_certificate_of_nobody(tmp_path: Path) -> None:
    with hub_server.serving(_own_certificate(tmp_path)) as hub:
        line = Line(hub, tmp_path / "part")
        with pytest.raises(DownloadFailed, match="cannot prove who it is") as caught:
            line.fetch()
        assert "clock" in caught.value.hint
        assert line.slept == []


def test_an_authority_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_server.serving(_own_certificate(tmp_path)) as hub:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "server.pem"))
        assert Line(hub, tmp_path / "part").fetch().sha256 == SHA256
        hub.faults.append(hub_server.redirect(hub.url.replace("https", "http") + "/x"))
        with pytest.raises(DownloadFailed, match="without encryption"):
            Line(hub, tmp_path / "part2").fetch()


def _own_certificate(folder: Path) -> ssl.SSLContext:
    """A server's context with a certificate that it signed itself, in server.pem."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a shop of its own")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (folder / "server.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "server.key").write_bytes(secret)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    return context
