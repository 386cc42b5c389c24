"""The programs that sign, each called the same way whether the key is a file or behind PKCS#11.

PKCS11_PROVIDER_MODULE names the module; an OPENSSL_CONF of the user's is used as it is. A PIN comes from
AI_ASSISTANT_PIN, or from pin-value= or pin-source= in the URI. It is handed to the programs through
an anonymous file, because a command line can be read by everybody on the machine.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote

from image.signing.errors import KeySetError, NoSpaceError, ToolError
from image.signing.keys import Key

# Without the quirk, programs crash at their end on modules that have closed their own OpenSSL before (SoftHSM).
OPENSSL_CONF = """\
openssl_conf = start
[start]
providers = providers
[providers]
pkcs11 = pkcs11
[pkcs11]
pkcs11-module-path = {module}
pkcs11-module-quirks = no-deinit
"""
Command = Sequence[str | Path]
MEASURE = "/usr/lib/systemd/systemd-measure"
SBSIGN = "/usr/lib/systemd/systemd-sbsign"
CHECKOUT = Path(__file__).resolve().parents[2]


def epoch() -> int:
    """The image's one time, in seconds since 1970."""
    found = re.search(r"^SourceDateEpoch=(\d+)$", (CHECKOUT / "mkosi.conf").read_text(), re.MULTILINE)
    if not found:
        raise ToolError("mkosi.conf has no SourceDateEpoch=")
    return int(found[1])


def run(
    command: Command,
    *,
    data: bytes | None = None,
    environment: dict[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> bytes:
    """Run a program and return what it printed.

    Raises:
        NoSpaceError: it found the disk full.
        ToolError: it is not there, or failed; with the last lines that it wrote.
    """
    name = Path(command[0]).name
    fixed = {"LC_ALL": "C.UTF-8", "TZ": "UTC", "SOURCE_DATE_EPOCH": str(epoch())}
    try:
        done = subprocess.run(
            [str(word) for word in command],
            input=data if data is not None else b"",
            capture_output=True,
            check=False,
            env=os.environ | fixed | (environment or {}),
            pass_fds=pass_fds,
        )
    except FileNotFoundError:
        raise ToolError(f"{name} is not there", "run it in the tools tree: image/sign does") from None
    if done.returncode:
        words = "; ".join((done.stderr or done.stdout).decode(errors="replace").strip().splitlines()[-4:])
        if "No space left" in words or "Disk full" in words:
            raise NoSpaceError(f"{name} found no space: {words}")
        raise ToolError(f"{name} ended with {done.returncode}: {words}")
    return done.stdout


def frozen_clock(libraries: Path = Path("/usr/lib")) -> dict[str, str]:
    """An environment in which a program believes that it is the image's time, so that signing twice gives the same.

    Raises:
        ToolError: libfaketime is not there.
    """
    found = sorted(libraries.glob("*/faketime/libfaketime.so.1"))
    if not found:
        raise ToolError("libfaketime is not there", "run it in the tools tree: image/sign does")
    time = datetime.fromtimestamp(epoch(), UTC).strftime("%Y-%m-%d %H:%M:%S")
    return {"LD_PRELOAD": str(found[0]), "FAKETIME": time, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


def _anonymous(content: bytes) -> int:
    """A file without a name; programs that inherit it open it as /proc/self/fd/N."""
    descriptor = os.memfd_create("signing", 0)
    os.write(descriptor, content)
    return descriptor


@dataclass
class Usable:
    """A private key as the programs want it: a word for the command line, and what must surround it."""

    word: str
    token: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    descriptors: list[int] = field(default_factory=list)

    def openssl(self) -> list[str]:
        return ["-provider", "pkcs11", "-provider", "default"] if self.token else []

    def systemd(self) -> list[str]:
        return [f"--private-key={self.word}", *(["--private-key-source=provider:pkcs11"] if self.token else [])]


@contextlib.contextmanager
def usable(key: Key) -> Iterator[Usable]:
    """Make a private key usable for as long as the context lasts."""
    if not key.in_token:
        yield Usable(str(key.private))
        return
    if not (module := os.environ.get("PKCS11_PROVIDER_MODULE", "")):
        raise KeySetError(
            f"{key.role} is in a token, and no PKCS#11 module is named",
            "PKCS11_PROVIDER_MODULE=/usr/lib/...so, as the tools tree sees it",
        )
    path, _, query = key.uri().partition("?")
    attributes = dict(each.split("=", 1) for each in query.split("&") if "=" in each)
    pin = os.environ.get("AI_ASSISTANT_PIN")
    if (value := attributes.pop("pin-value", None)) is not None and pin is None:
        pin = unquote(value)
    descriptors: list[int] = []
    environment = {}
    try:
        if pin is not None:
            descriptors.append(_anonymous(pin.encode()))
            attributes["pin-source"] = f"file:/proc/self/fd/{descriptors[-1]}"
        if "OPENSSL_CONF" not in os.environ:
            descriptors.append(_anonymous(OPENSSL_CONF.format(module=module).encode()))
            environment["OPENSSL_CONF"] = f"/proc/self/fd/{descriptors[-1]}"
        query = "&".join(f"{name}={value}" for name, value in attributes.items())
        yield Usable(f"{path}?{query}" if query else path, True, environment, descriptors)
    finally:
        for each in descriptors:
            os.close(each)


def _with_key(key: Key, command: Command, used: Usable, **more: str) -> bytes:
    try:
        return run(command, environment=used.environment | more, pass_fds=used.descriptors)
    except ToolError as error:
        if not used.token:
            raise
        raise KeySetError(
            f"the token did not sign as {key.role}: {error.message}",
            "check the URI, AI_ASSISTANT_PIN, PKCS11_PROVIDER_MODULE, and that the tools tree sees them (TOOLBOX_BIND)",
        ) from None


def sign_program(key: Key, source: Path, target: Path) -> None:
    """Sign an EFI program with the secure-boot key, and check the signature against its certificate."""
    with usable(key) as used:
        command: Command = [
            SBSIGN,
            "sign",
            *used.systemd(),
            f"--certificate={key.public}",
            f"--output={target}",
            source,
        ]
        _with_key(key, command, used, **frozen_clock())
    try:
        run(["sbverify", "--cert", key.public, target])
    except ToolError as error:
        raise KeySetError(f"the signature on {source.name} does not fit {key.public}: {error.message}") from None


def sign_bytes(key: Key, path: Path) -> bytes:
    """A DER signature (SHA-256) over a file, checked against the public half."""
    with usable(key) as used:
        command: Command = ["openssl", "dgst", "-sha256", *used.openssl(), "-sign", used.word, path]
        signature = _with_key(key, command, used)
    if not verifies(key, path.read_bytes(), signature):
        raise KeySetError(f"the {key.role} signature does not fit {key.public}", "is the right object in the URI?")
    return signature


def verifies(key: Key, content: bytes, signature: bytes) -> bool:
    """Whether a signature (SHA-256) is that of the key's public half."""
    descriptor = _anonymous(signature)
    try:
        command: Command = [
            "openssl",
            "dgst",
            "-sha256",
            "-verify",
            key.public,
            "-signature",
            f"/proc/self/fd/{descriptor}",
        ]
        run(command, data=content, pass_fds=[descriptor])
    except ToolError:
        return False
    finally:
        os.close(descriptor)
    return True


def sign_message(key: Key, content: bytes) -> bytes:
    """A detached PKCS#7 signature (DER) over some bytes, without attributes: what UEFI wants on its variables."""
    with usable(key) as used:
        descriptor = _anonymous(content)
        used.descriptors.append(descriptor)
        try:
            command: Command = [
                "openssl", "cms", "-sign", "-binary", "-noattr", "-nosmimecap", "-outform", "DER", "-md", "sha256",
                *used.openssl(), "-in", f"/proc/self/fd/{descriptor}", "-signer", key.public, "-inkey", used.word,
            ]  # fmt: skip
            return _with_key(key, command, used)
        finally:
            used.descriptors.remove(descriptor)
            os.close(descriptor)
