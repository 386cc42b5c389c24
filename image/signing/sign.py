"""Unsigned artefacts in, signed ones out; the unsigned ones are never touched.

    build/unsigned/NAME.{raw,efi,manifest}  ->  build/NAME.{raw,efi,manifest,measurements.json[.sig],sbom.json}

Everything is made under another name beside the result and moved at the end, NAME.raw last: an image that is there
is a whole one, whatever was killed or filled up on the way.
"""

from __future__ import annotations

import argparse
import base64
import errno
import fcntl
import json
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

from image import sbom
from image.signing import keys, measure, variables
from image.signing.errors import ImageError, KeySetError, NoSpaceError, SigningError, ToolError
from image.signing.esp import ESP, partitions
from image.signing.keys import Key, KeySet
from image.signing.pe import PE
from image.signing.tools import run, sign_bytes, sign_program, verifies

LOADERS = ("/EFI/BOOT/BOOTX64.EFI", "/EFI/systemd/systemd-bootx64.efi")
PROFILES = ("developer", "production", "test")
UKIFY = Path("/usr/bin/ukify")
_NAME = re.compile(r"ai-assistant(?:-(developer|production|test))?_([^_/]+)_([^_/]+)")


@dataclass(frozen=True)
class Name:
    """An artefact's name taken apart: ai-assistant[-PROFILE]_VERSION_ARCHITECTURE."""

    text: str
    profile: str
    version: str
    architecture: str

    @classmethod
    def parse(cls, text: str) -> Name:
        found = _NAME.fullmatch(text)
        if not found:
            raise ImageError(f"'{text}' is no name of an image", "as in ai-assistant-production_0.1.0_x86-64")
        return cls(text, found[1] or "developer", found[2], found[3])

    @classmethod
    def of(cls, profile: str, version: str) -> Name:
        return cls.parse(f"ai-assistant{'' if profile == 'developer' else '-' + profile}_{version}_x86-64")


def add_section(source: Path, name: str, content: bytes, target: Path) -> None:
    """Append a section to a PE file as ukify does it, leaving all that is there as it is."""
    # ukify has no command for it: its command line would replace .sbat and .pcrpkey of a UKI taken as the stub.
    loader = SourceFileLoader("ukify", str(UKIFY))
    spec = spec_from_loader("ukify", loader)
    assert spec is not None
    if not UKIFY.exists():
        raise ToolError("ukify is not there", "run it in the tools tree: image/sign does")
    ukify = module_from_spec(spec)
    sys.modules["ukify"] = ukify  # Its dataclasses look their module up.
    loader.exec_module(ukify)
    uki = ukify.UKI(source)
    uki.add_section(ukify.Section.create(name, content))
    try:
        ukify.pe_add_sections(uki, str(target))
    except ukify.PEError as error:
        raise ImageError(f"{source.name} has no room for {name}: {error}") from None


def check_kept(before: PE, after: PE, added: str) -> None:
    """That nothing but one section at the end is new.

    Raises:
        ImageError: a section was lost, moved or changed.
    """
    if after.names() != [*before.names(), added]:
        raise ImageError(f"{before.name}: adding {added} changed the sections to {', '.join(after.names())}")
    for section in before.sections:
        if before.content(section.name) != after.content(section.name):
            raise ImageError(f"{before.name}: adding {added} changed {section.name}")


def check_pcr_key(uki: PE, key: Key) -> None:
    """That the UKI was built for this key: its .pcrpkey is what the TPM will be told to trust."""
    inside = uki.find(".pcrpkey")
    if inside is None:
        raise ImageError(f"{uki.name} carries no PCR public key (.pcrpkey)", "build it again: make image")
    try:
        der = keys.openssl("pkey", "-pubin", "-outform", "DER", data=inside)
    except ToolError:
        raise ImageError(f"the PCR public key in {uki.name} is not readable") from None
    if der != keys.public_of(key):
        raise KeySetError(
            f"{uki.name} was built for another PCR key than {key.public}",
            "sign with the keys that it was built with (--keys), or build it again: make image",
        )


def check_pcr_signature(section: bytes, key: Key) -> None:
    for each in json.loads(section)["sha256"]:
        if not verifies(key, bytes.fromhex(each["pol"]), base64.b64decode(each["sig"])):
            raise KeySetError(f"the PCR signature does not fit {key.public}", "is the right object in the URI?")


def copy(source: Path, target: Path) -> None:
    """Copy an image of several GB as cheaply as the file system can.

    Raises:
        NoSpaceError: before or while copying.
    """
    needed, free = source.stat().st_blocks * 512, shutil.disk_usage(target.parent).free
    try:
        run(["cp", "--sparse=always", "--reflink=always", source, target])
    except ToolError:
        if needed > free:
            raise NoSpaceError(
                f"{source.name} needs {needed / 1e6:.0f} MB in {target.parent.parent}; {free / 1e6:.0f} MB are free",
                "make clean, or --output on another disk",
            ) from None
        run(["cp", "--sparse=always", "--reflink=auto", source, target])
    target.chmod(0o644)


class Job:
    """Signing one image; ``scratch`` is a folder beside the result, on the same file system."""

    def __init__(self, name: Name, unsigned: Path, keyset: KeySet, scratch: Path) -> None:
        self.name = name
        self.unsigned = unsigned
        self.keys = keyset
        self.scratch = scratch

    def result(self, suffix: str) -> Path:
        return self.scratch / f"{self.name.text}.{suffix}"

    def source(self, suffix: str) -> Path:
        path = self.unsigned / f"{self.name.text}.{suffix}"
        if not path.is_file():
            raise ImageError(f"{path} is not there", "make image")
        return path

    def _uki_path(self, esp: ESP) -> str:
        found = [path for path in esp.files() if re.fullmatch(r"/EFI/Linux/[^/]+\.efi", path, re.IGNORECASE)]
        if len(found) != 1:
            listed = ": " + ", ".join(found) if found else ""
            raise ImageError(f"{esp.image.name} has {len(found) or 'no'} unified kernel images, not one{listed}")
        return found[0]

    def _unsigned_uki(self, esp: ESP, path: str) -> PE:
        uki = PE.read(self.source("efi"))
        inside = self.scratch / "uki.inside"
        esp.read(path, inside)
        if inside.read_bytes() != uki.data:
            raise ImageError(f"{uki.name} is not the one inside {esp.image.name}", "build them again: make image")
        if uki.signed or uki.find(".pcrsig") is not None:
            raise ImageError(f"{uki.name} is signed already", "image/sign wants what is in build/unsigned")
        # The first halves of the root hash are the identifiers of the partitions that it vouches for.
        root_hash, identifiers = measure.root_hash(uki), {each.uuid for each in partitions(esp.image)}
        if not {root_hash[:32], root_hash[32:]} <= identifiers:
            raise ImageError(f"{uki.name} vouches for another root than the one in {esp.image.name}")
        check_pcr_key(uki, self.keys.pcr)
        return uki

    def _sign_uki(self, before: PE) -> PE:
        section = measure.pcr_signature(before, self.keys.pcr, self.scratch)
        check_pcr_signature(section, self.keys.pcr)
        complete, signed = self.scratch / "uki.complete", self.result("efi")
        add_section(self.source("efi"), ".pcrsig", section, complete)
        sign_program(self.keys.secure_boot, complete, signed)
        after = PE.read(signed)
        check_kept(before, after, ".pcrsig")
        return after

    def _sign_loaders(self, esp: ESP) -> dict[str, Path]:
        signed = {}
        for index, path in enumerate(LOADERS):
            if not esp.has(path):
                raise ImageError(f"{esp.image.name} has no boot loader {path}")
            plain, target = self.scratch / f"loader{index}", self.scratch / f"loader{index}.signed"
            esp.read(path, plain)
            if PE.read(plain).signed:
                raise ImageError(f"{path} in {esp.image.name} is signed already", "SecureBoot=no in mkosi.conf")
            sign_program(self.keys.secure_boot, plain, target)
            signed[path] = target
        return signed

    def _enrolment(self) -> dict[str, Path]:
        content = variables.signature_list(self.keys.secure_boot, self.scratch)
        files = {}
        for name in variables.ENROLLED:
            path = self.scratch / f"{name}.auth"
            path.write_bytes(variables.enrolment(self.keys.secure_boot, name, content))
            files[f"/loader/keys/auto/{name}.auth"] = path
        return files

    def _measurements(self, uki_path: str, uki: PE, loader: Path) -> dict[str, Path]:
        document, signature = self.result("measurements.json"), self.result("measurements.json.sig")
        document.write_bytes(
            measure.document(
                profile=self.name.profile,
                version=self.name.version,
                architecture=self.name.architecture,
                uki_file=Path(uki_path).name,
                uki=uki,
                loader=PE.read(loader),
                key=self.keys.secure_boot,
                scratch=self.scratch,
            )
        )
        signature.write_bytes(base64.b64encode(sign_bytes(self.keys.release, document)) + b"\n")
        where = f"/loader/ai-assistant/measurements-{self.name.version}.json"
        return {where: document, f"{where}.sig": signature}

    def run(self) -> None:
        """Make every result in the scratch folder."""
        raw = self.result("raw")
        manifest = self.source("manifest")
        uki_path = self._uki_path(esp := ESP(self.source("raw")))
        before = self._unsigned_uki(esp, uki_path)
        loaders = self._sign_loaders(esp)
        uki = self._sign_uki(before)
        files = {uki_path: self.result("efi"), **loaders, **self._enrolment()}
        files |= self._measurements(uki_path, uki, loaders[LOADERS[0]])
        shutil.copyfile(manifest, self.result("manifest"))
        initrd = self.unsigned / f"{self.name.text}.initrd.manifest"
        self.result("sbom.json").write_bytes(sbom.document(manifest, initrd if initrd.exists() else None))
        copy(self.source("raw"), raw)
        esp = ESP(raw)
        for path, file in files.items():
            esp.write(file, path)
        self._check_written(esp, files)

    def _check_written(self, esp: ESP, files: dict[str, Path]) -> None:
        for path, file in files.items():
            back = self.scratch / "back"
            esp.read(path, back)
            if back.read_bytes() != file.read_bytes():
                raise ImageError(f"{path} does not read back from {esp.image.name} as it was written")
            back.unlink()


# In this order; the image itself last, since its presence says that all the others are there.
RESULTS = ("efi", "manifest", "measurements.json", "measurements.json.sig", "sbom.json", "raw")


def sign(name: Name, unsigned: Path, output: Path, keyset: KeySet) -> Path:
    """Sign one image and return where it is.

    Raises:
        KeySetError: not with these keys; among others.
    """
    keys.check_profile(keyset, name.profile)
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".signing.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in output.glob(f".signing-{name.text}.*"):
            shutil.rmtree(left)  # of one that was killed: the lock says that nobody is at it
        scratch = Path(tempfile.mkdtemp(prefix=f".signing-{name.text}.", dir=output))
        try:
            job = Job(name, unsigned, keyset, scratch)
            job.run()
            final = output / f"{name.text}.raw"
            final.unlink(missing_ok=True)
            for suffix in RESULTS:
                job.result(suffix).rename(output / f"{name.text}.{suffix}")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpaceError(f"no space in {output}", "make clean, or --output on another disk") from None
            raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return final


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="image/sign", description="Sign an image.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("name", nargs="?", metavar="NAME", help="as in ai-assistant-production_0.1.0_x86-64")
    what.add_argument("--profile", choices=PROFILES, help="the image of this version and profile")
    parser.add_argument("--keys", type=Path, help="folder with the keys (image/keys --path)")
    parser.add_argument("--unsigned", type=Path, default=Path("build/unsigned"), help="folder to take from")
    parser.add_argument("--output", type=Path, default=Path("build"), help="folder to put into")
    options = parser.parse_args(arguments)
    os.umask(0o022)
    try:
        version = (Path(__file__).resolve().parents[2] / "mkosi.version").read_text().strip()
        name = Name.parse(options.name) if options.name else Name.of(options.profile, version)
        where = (options.keys or keys.folder()).absolute()
        keyset = keys.load(where)
        if keyset is None:
            raise KeySetError(f"no keys in {where}", "make keys")
        path = sign(name, options.unsigned.absolute(), options.output.absolute(), keyset)
    except SigningError as error:
        print(f"sign: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        words = SigningError(f"{error.filename}: {error.strerror}", "is the folder there, and may it be written?")
        print(f"sign: {words}", file=sys.stderr)
        return 1
    print(f"sign: {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
