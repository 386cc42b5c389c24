"""The keys that sign an image: where they are, whether they are whole, and test keys for development.

A set is three roles. The public halves are inputs of the build, the private ones of image/sign only:

    secure-boot   secure-boot.crt   X.509, enrolled as PK, KEK and db; signs every EFI program
    pcr           pcr.pub           signs the PCR 11 values under which the TPM opens /var
    release       release.pub       signs measurements.json

A private half is ROLE.key (PEM), or ROLE.uri with one line ``pkcs11:...`` for a key that never leaves its token;
with pcr.uri goes pcr.crt, a certificate for pcr.pub, which systemd-measure then asks for.

A set that is not a generated TEST set signs images of one profile only: the one that the file `profile` names.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from image.signing.errors import KeySetError, SigningError, ToolError

# A test key must outlive the machines that were tried with it.
TEST_KEY_DAYS = 20 * 366
TEST_KEY_NAME = "AI Assistant OS generated TEST key"
PROFILE = "profile"
_MAX_PROFILE = 100
PUBLIC = {"secure-boot": "secure-boot.crt", "pcr": "pcr.pub", "release": "release.pub"}


@dataclass(frozen=True)
class Key:
    """One role's two halves; ``private`` is a PEM file, or a file with a PKCS#11 URI, or None."""

    role: str
    public: Path
    private: Path | None

    @property
    def certificate(self) -> Path:
        return self.public.with_suffix(".crt")

    @property
    def in_token(self) -> bool:
        return self.private is not None and self.private.suffix == ".uri"

    def uri(self) -> str:
        """The PKCS#11 URI of a key in a token."""
        assert self.private is not None
        text = self.private.read_text().strip()
        if not text.startswith("pkcs11:") or len(text.split()) != 1:
            raise KeySetError(
                f"{self.private} holds no PKCS#11 URI",
                "one line, as in pkcs11:token=release;object=secure-boot;type=private",
            )
        return text


@dataclass(frozen=True)
class KeySet:
    """A whole set; ``load`` is the way to get one."""

    folder: Path
    secure_boot: Key
    pcr: Key
    release: Key

    @property
    def all(self) -> tuple[Key, Key, Key]:
        return self.secure_boot, self.pcr, self.release

    def describe(self) -> dict[str, object]:
        return {
            "folder": str(self.folder),
            "keys": {
                key.role: {"public": key.public.name, "private": key.private.name if key.private else None}
                for key in self.all
            },
        }


def folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where the keys are: $AI_ASSISTANT_KEYS, or the user's configuration folder."""
    if named := environment.get("AI_ASSISTANT_KEYS"):
        return Path(named).absolute()
    home = Path(environment.get("HOME") or "~").expanduser()
    return Path(environment.get("XDG_CONFIG_HOME") or home / ".config").absolute() / "ai-assistant" / "keys"


def openssl(*arguments: str | Path, data: bytes | None = None) -> bytes:
    """Run openssl and return what it printed."""
    try:
        done = subprocess.run(["openssl", *arguments], input=data, capture_output=True, check=False)
    except FileNotFoundError:
        raise ToolError("openssl is not there", "run it in the tools tree: image/toolbox ...") from None
    if done.returncode:
        # The dots and plus signs of key generation are no words.
        lines = [line for line in done.stderr.decode(errors="replace").splitlines() if not set(line) <= set(".+*-")]
        raise ToolError(f"openssl {arguments[0]} failed: {'; '.join(lines)}")
    return done.stdout


def _private(where: Path, role: str) -> Path | None:
    found = [path for path in (where / f"{role}.key", where / f"{role}.uri") if path.exists()]
    if len(found) > 1:
        raise KeySetError(f"{where} has both {found[0].name} and {found[1].name}", "remove the one that is not in use")
    return found[0] if found else None


def _public_of_certificate(path: Path) -> bytes:
    pem = openssl("x509", "-in", path, "-noout", "-pubkey")
    return openssl("pkey", "-pubin", "-outform", "DER", data=pem)


def public_of(key: Key) -> bytes:
    """The public half as DER, from the certificate or the public key beside it."""
    if key.public == key.certificate:
        return _public_of_certificate(key.public)
    return openssl("pkey", "-pubin", "-in", key.public, "-outform", "DER")


def _check_pair(key: Key) -> None:
    try:
        public = public_of(key)
    except ToolError as error:
        raise KeySetError(f"{key.public} is not readable as a key: {error.message}") from None
    if key.private is None:
        return
    if key.in_token:
        key.uri()
        if key.role == "pcr" and (not key.certificate.exists() or _public_of_certificate(key.certificate) != public):
            raise KeySetError(
                f"{key.private} needs a certificate for {key.public.name} beside it: {key.certificate.name}",
                "docs/signing.md has the command that makes one",
            )
        return  # Whether the token holds the right key shows when it signs: every signature is verified.
    try:
        # An empty pass phrase rather than a question: nobody may be there to answer it.
        private = openssl("pkey", "-in", key.private, "-passin", "pass:", "-pubout", "-outform", "DER")
    except ToolError as error:
        raise KeySetError(
            f"{key.private} is not readable as a private key: {error.message}",
            "PEM without a pass phrase; a key to be protected belongs in a token (PKCS#11)",
        ) from None
    if public != private:
        raise KeySetError(f"{key.private.name} and {key.public.name} in {key.public.parent} are not one pair")


def load(where: Path, *, private: bool = True) -> KeySet | None:
    """The set in a folder, or None where there is none at all.

    Raises:
        KeySetError: a set that is not whole, or whose halves do not belong together.
    """
    keys = {role: Key(role, where / name, _private(where, role)) for role, name in PUBLIC.items()}
    missing: list[str] = []
    present: list[str] = []
    for key in keys.values():
        (present if key.public.exists() else missing).append(key.public.name)
        (present if key.private else missing).append(key.private.name if key.private else f"{key.role}.key")
    if not present:
        return None
    if not private:
        missing = [name for name in missing if name in PUBLIC.values()]
    if missing:
        raise KeySetError(
            f"half a key set in {where}: no {', no '.join(missing)}",
            "bring back what is missing from your backup, or move the folder away for a new test set"
            + ("" if any(name in PUBLIC.values() for name in missing) else "; --public is enough to build unsigned"),
        )
    for key in keys.values():
        _check_pair(key)
    return KeySet(where, keys["secure-boot"], keys["pcr"], keys["release"])


def is_test(keyset: KeySet) -> bool:
    """Whether the set was generated here: the secure-boot certificate has the name that `generate` gives."""
    name = openssl("x509", "-in", keyset.secure_boot.public, "-noout", "-subject", "-nameopt", "RFC2253")
    return name.decode(errors="replace").strip() == f"subject=CN={TEST_KEY_NAME} (secure-boot)"


def check_profile(keyset: KeySet, profile: str) -> None:
    """That a set may sign images of a profile.

    A machine's TPM opens its data to whatever these keys have signed. A test image does what anybody tells it, and a
    developer image lets its user in: signed with the keys of production machines, each would open their disks.

    Raises:
        KeySetError: it may not.
    """
    path = keyset.folder / PROFILE
    try:
        with path.open("rb") as file:
            said = file.read(_MAX_PROFILE).decode(errors="replace").strip()
    except FileNotFoundError:
        said = None
    test = is_test(keyset)
    if profile == "test" and not test:
        raise KeySetError(
            f"a test image is signed with generated TEST keys only, and {keyset.secure_boot.public} is none",
            "name a folder for test keys: AI_ASSISTANT_KEYS=FOLDER for image/keys, image/build and image/sign",
        )
    if said is None and test:
        return
    if said is None:
        raise KeySetError(
            f"{keyset.folder} does not say images of which profile its keys sign",
            f"if they are those of {profile} machines alone: echo {profile} >{path}; docs/signing.md tells why",
        )
    if said not in ("developer", "production", *(["test"] if test else [])):
        raise KeySetError(f"{path} names no profile", "one word: production or developer")
    if said != profile:
        raise KeySetError(
            f"the keys in {keyset.folder} sign {said} images, not {profile} ones",
            f"AI_ASSISTANT_KEYS= or --keys names a set for {profile}; an image is built with the keys that sign it",
        )


def _certificate(where: Path, role: str) -> None:
    openssl(
        "req", "-new", "-x509", "-sha256", "-newkey", "rsa:2048", "-noenc",
        "-subj", f"/CN={TEST_KEY_NAME} ({role})", "-days", str(TEST_KEY_DAYS),
        "-keyout", where / f"{role}.key", "-out", where / f"{role}.crt",
    )  # fmt: skip


def generate(where: Path) -> None:
    """Make a test set in a folder that is not there yet, or is empty: whole, or not at all."""
    where.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{where.name}.", dir=where.parent))
    try:
        _certificate(partial, "secure-boot")
        # systemd-measure wants a certificate where the private key is in a token.
        _certificate(partial, "pcr")
        (partial / "pcr.pub").write_bytes(openssl("pkey", "-in", partial / "pcr.key", "-pubout"))
        openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", partial / "release.key")
        (partial / "release.pub").write_bytes(openssl("pkey", "-in", partial / "release.key", "-pubout"))
        for path in partial.iterdir():
            path.chmod(0o600 if path.suffix == ".key" else 0o644)
            with path.open("rb") as written:
                os.fsync(written.fileno())
        # Two at the same time: the second finds a folder that is not empty, and takes what is there.
        partial.rename(where)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def ensure(where: Path, *, private: bool = True) -> tuple[KeySet, bool]:
    """The set in a folder; a test set is made where nothing is. The flag says whether it was made now."""
    made = False
    if (found := load(where, private=private)) is None:
        if where.is_dir() and any(where.iterdir()):
            raise KeySetError(
                f"{where} holds no keys but other things", "name a folder of its own in AI_ASSISTANT_KEYS"
            )
        try:
            generate(where)
            made = True
        except FileExistsError:
            pass
        except OSError as error:
            if not where.is_dir() or not any(where.iterdir()):
                raise KeySetError(f"cannot make keys in {where}: {error.strerror}") from None
        found = load(where, private=private)
    assert found is not None
    return found, made


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="image/keys", description="Make a set of test keys once, and say where it is."
    )
    parser.add_argument("--ensure", action="store_true", help="say nothing when the set is there already")
    parser.add_argument("--path", action="store_true", help="only print the folder; nothing is made or checked")
    parser.add_argument("--public", action="store_true", help="the public halves are enough (for a rebuild)")
    parser.add_argument("--json", action="store_true", help="what there is, as JSON")
    options = parser.parse_args(arguments)
    os.umask(0o077)
    if options.path:
        print(folder())
        return 0
    try:
        found, made = ensure(folder(), private=not options.public)
    except SigningError as error:
        print(f"keys: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"keys: {KeySetError(f'{error.filename}: {error.strerror}')}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(found.describe() | {"made": made}, indent=2))
    elif made:
        print(
            f"keys: made TEST keys in {found.folder}; keep them to update the machines that you flash", file=sys.stderr
        )
    elif not options.ensure:
        print(f"keys: the set in {found.folder} is whole", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
