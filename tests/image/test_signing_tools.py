"""Signing with the real programs: a small image with a unified kernel of systemd's stub: signed, checked, broken."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from image.signing import keys, measure, variables
from image.signing.errors import ImageError, KeySetError, NoSpaceError, SigningError
from image.signing.esp import ESP
from image.signing.keys import KeySet
from image.signing.pe import PE
from image.signing.sign import LOADERS, PROFILES, RESULTS, Name, sign
from image.signing.tools import frozen_clock, run

pytestmark = pytest.mark.tools

CHECKOUT = Path(__file__).resolve().parents[2]
STUBS = Path("/usr/lib/systemd/boot/efi")
MODULE = "/usr/lib/softhsm/libsofthsm2.so"
ROOT_HASH = hashlib.sha256(b"a root").hexdigest()
NAME = Name.of("test", "1.2")
UKI = "/EFI/Linux/test-1.2.efi"
MIB = 2**20
ESP_MIB = 40


def uuid_of(half: str) -> str:
    return f"{half[:8]}-{half[8:12]}-{half[12:16]}-{half[16:20]}-{half[20:]}"


@dataclass(frozen=True)
class Unsigned:
    """A folder with an unsigned image, and the keys that it was built for."""

    folder: Path
    keys: KeySet

    def path(self, suffix: str) -> Path:
        return self.folder / f"{NAME.text}.{suffix}"

    def copy(self, target: Path) -> Unsigned:
        run(["cp", "-r", "--sparse=always", "--reflink=auto", self.folder, target])
        return Unsigned(target, self.keys)

    def sign(self, output: Path) -> Path:
        return sign(NAME, self.folder, output, self.keys)

    def replace_uki(self, path: Path) -> None:
        shutil.copyfile(path, self.path("efi"))
        ESP(self.path("raw")).write(self.path("efi"), UKI)


def make_uki(target: Path, pcr_key: Path, *more: str) -> None:
    # A boot loader stands for the kernel: an EFI program that the stub could start.
    initrd = target.with_suffix(".initrd")
    initrd.write_bytes(hashlib.shake_128(b"initrd").digest(3 * MIB))
    run(
        [
            "ukify", "build", f"--stub={STUBS}/linuxx64.efi.stub", f"--linux={STUBS}/systemd-bootx64.efi",
            f"--initrd={initrd}", "--uname=6.12", f"--cmdline=roothash={ROOT_HASH} quiet", "--os-release=ID=test\n",
            f"--pcrpkey={pcr_key}", f"--output={target}", *more,
        ]
    )  # fmt: skip
    initrd.unlink()


def make_disk(target: Path, files: dict[str, Path], *, esp: bool = True) -> None:
    kinds = {True: "C12A7328-F81F-11D2-BA4B-00A0C93EC93B", False: "0FC63DAF-8483-4772-8E79-3D69D8477DE4"}
    rows = [
        f"start=1MiB,size={ESP_MIB}MiB,type={kinds[esp]}",
        f"size=1MiB,type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709,uuid={uuid_of(ROOT_HASH[:32])}",
        f"size=1MiB,type=2C7357ED-EBD2-46D9-AEC1-23D437EC2BF5,uuid={uuid_of(ROOT_HASH[32:])}",
    ]
    with target.open("wb") as disk:
        disk.truncate(300 * MIB)
    run(["sfdisk", "--quiet", target], data="\n".join(["label: gpt", *rows, ""]).encode())
    system = target.with_suffix(".esp")
    with system.open("wb") as empty:
        empty.truncate(ESP_MIB * MIB)
    run(["mkfs.vfat", "-F", "32", "-s", "1", system])
    run(["dd", f"if={system}", f"of={target}", "bs=1M", "seek=1", "conv=notrunc,sparse"])
    system.unlink()
    if esp:
        for path, source in files.items():
            ESP(target).write(source, path)


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Unsigned:
    base = tmp_path_factory.mktemp("unsigned")
    keyset, made = keys.ensure(base / "keys")
    assert made
    found = Unsigned(base / "image", keyset)
    found.folder.mkdir()
    loader = base / "loader.efi"
    shutil.copyfile(STUBS / "systemd-bootx64.efi", loader)
    make_uki(found.path("efi"), keyset.pcr.public)
    make_disk(found.path("raw"), {UKI: found.path("efi"), **dict.fromkeys(LOADERS, loader)})
    row = {"type": "deb", "name": "dbus", "version": "1", "architecture": "amd64"}
    found.path("manifest").write_text(json.dumps({"config": {"name": "ai-assistant-test"}, "packages": [row]}))
    return found


@pytest.fixture(scope="session")
def signed(original: Unsigned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in original.folder.iterdir()}
    raw = original.sign(tmp_path_factory.mktemp("signed"))
    assert {path: hashlib.sha256(path.read_bytes()).digest() for path in original.folder.iterdir()} == before
    return raw


@pytest.fixture
def unsigned(original: Unsigned, tmp_path: Path) -> Unsigned:
    """A copy to break."""
    return original.copy(tmp_path / "unsigned")


def beside(raw: Path, suffix: str) -> Path:
    return raw.with_name(f"{NAME.text}.{suffix}")


def measurements(raw: Path) -> dict[str, object]:
    return dict(json.loads(beside(raw, "measurements.json").read_text()))


# A signed image


def test_all_results_are_there_and_nothing_else(signed: Path) -> None:
    assert signed == beside(signed, "raw")
    found = {path.name for path in signed.parent.iterdir()}
    assert found == {f"{NAME.text}.{suffix}" for suffix in RESULTS} | {".signing.lock"}


def test_the_esp_holds_what_lies_beside_the_image(signed: Path, original: Unsigned, tmp_path: Path) -> None:
    esp = ESP(signed)
    on_esp = {
        UKI: beside(signed, "efi"),
        "/loader/ai-assistant/measurements-1.2.json": beside(signed, "measurements.json"),
        "/loader/ai-assistant/measurements-1.2.json.sig": beside(signed, "measurements.json.sig"),
    }
    for path, file in on_esp.items():
        esp.read(path, tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == file.read_bytes()
    for path in (UKI, *LOADERS):
        esp.read(path, tmp_path / "program")
        run(["sbverify", "--cert", original.keys.secure_boot.public, tmp_path / "program"])
        # The hash that we publish is the one that the signature is about.
        pe = PE.read(tmp_path / "program")
        assert pe.authenticode() in pe.data[-pe.signature_size :]


def test_the_uki_kept_its_sections(signed: Path, original: Unsigned) -> None:
    pefile = importlib.import_module("pefile")  # of the tools tree: a reader of PE files that is not ours

    def sections(path: Path) -> list[tuple[bytes, int, bytes]]:
        pe = pefile.PE(str(path), fast_load=True)
        return [(each.Name, each.VirtualAddress, each.get_data()) for each in pe.sections]

    before, after = sections(original.path("efi")), sections(beside(signed, "efi"))
    assert after[:-1] == before
    assert after[-1][0] == b".pcrsig\0"
    wanted = {b".osrel", b".cmdline", b".initrd", b".linux", b".uname", b".sbat", b".pcrpkey"}
    assert wanted <= {name.rstrip(b"\0") for name, _, _ in after}


def extend(pcr: bytes, digest: bytes) -> bytes:
    return hashlib.sha256(pcr + digest).digest()


def test_pcr_11_is_what_the_stub_and_systemd_extend(signed: Path) -> None:
    uki = PE.read(beside(signed, "efi"))
    pcr = bytes(32)
    for name in [".linux", ".osrel", ".cmdline", ".initrd", ".uname", ".sbat", ".pcrpkey"]:
        pcr = extend(pcr, hashlib.sha256(name.encode() + b"\0").digest())
        pcr = extend(pcr, hashlib.sha256(uki.content(name)).digest())
    expected, path = {}, []
    for phase in ("enter-initrd", "leave-initrd", "sysinit", "ready"):
        path.append(phase)
        pcr = extend(pcr, hashlib.sha256(phase.encode()).digest())
        expected[":".join(path)] = pcr.hex()
    published = measurements(signed)["pcr11"]
    assert isinstance(published, dict)
    assert published["sha256"] == expected
    for section in published["sections"]:
        assert section["sha256"] == hashlib.sha256(uki.content(section["name"])).hexdigest()


def test_the_policy_is_signed_for_each_phase(signed: Path, original: Unsigned) -> None:
    section = json.loads(PE.read(beside(signed, "efi")).content(".pcrsig"))
    policies = {}
    for phase, value in measurements(signed)["pcr11"]["sha256"].items():  # type: ignore[index]
        # TPM2_PolicyPCR: command code, then the selection of PCR 11 in the SHA-256 bank, then the digest of its value.
        selection = bytes.fromhex("00000001000b03000800")
        command = bytes.fromhex("0000017f")
        value = hashlib.sha256(bytes.fromhex(value)).digest()
        policies[hashlib.sha256(bytes(32) + command + selection + value).hexdigest()] = phase
    assert {each["pol"] for each in section["sha256"]} == set(policies)
    assert sorted(policies.values()) == sorted(measure.PHASES)
    public = keys.openssl("rsa", "-pubin", "-in", original.keys.pcr.public, "-RSAPublicKey_out", "-outform", "DER")
    fingerprint = hashlib.sha256(public).hexdigest()
    assert {each["pkfp"] for each in section["sha256"]} == {fingerprint}


def test_the_measurements_are_signed_and_complete(signed: Path, original: Unsigned, tmp_path: Path) -> None:
    signature = tmp_path / "signature"
    signature.write_bytes(base64.b64decode(beside(signed, "measurements.json.sig").read_bytes()))
    command: list[str | Path] = [
        "openssl",
        "dgst",
        "-sha256",
        "-verify",
        original.keys.release.public,
        "-signature",
        signature,
    ]
    run([*command, beside(signed, "measurements.json")])
    content = measurements(signed)
    assert (content["format"], content["profile"], content["version"], content["uki"]) == (1, "test", "1.2", UKI[11:])
    assert content["root_hash"] == ROOT_HASH
    assert content["command_line"] == f"roothash={ROOT_HASH} quiet"
    assert content["pcr12"] == {"sha256": "0" * 64}


def der(tag: int, content: bytes) -> bytes:
    length = len(content).to_bytes(4, "big").lstrip(b"\0")
    return bytes([tag, *([0x80 | len(length)] if len(content) > 127 else []), *length]) + content


def test_enrolment_files_carry_the_certificate_and_its_signature(
    signed: Path, original: Unsigned, tmp_path: Path
) -> None:
    content = variables.signature_list(original.keys.secure_boot, tmp_path)
    assert variables.certificate(original.keys.secure_boot) in content
    for name in variables.ENROLLED:
        file = tmp_path / f"{name}.auth"
        ESP(signed).read(f"/loader/keys/auto/{name}.auth", file)
        auth = file.read_bytes()
        length = int.from_bytes(auth[16:20], "little")
        assert auth[16 + length :] == content
        # What UEFI has signed: name, vendor, attributes, time, content.
        message = name.encode("utf-16-le") + variables.VENDOR[name].bytes_le + b"\x27\0\0\0" + auth[:16] + content
        (tmp_path / "message").write_bytes(message)
        oid = bytes.fromhex("06092a864886f70d010702")
        (tmp_path / "signature").write_bytes(der(0x30, oid + der(0xA0, auth[40 : 16 + length])))
        command: list[str | Path] = ["openssl", "cms", "-verify", "-noverify", "-binary", "-inform", "DER"]
        command += ["-in", tmp_path / "signature", "-content", tmp_path / "message"]
        run([*command, "-certfile", original.keys.secure_boot.public])
        (tmp_path / "message").write_bytes(message + b"x")
        with pytest.raises(SigningError):
            run([*command, "-certfile", original.keys.secure_boot.public])


def test_signing_twice_gives_the_same(signed: Path, original: Unsigned, tmp_path: Path) -> None:
    assert frozen_clock()
    again = original.sign(tmp_path)
    once_more = original.sign(tmp_path)
    assert again == once_more
    for suffix in RESULTS:
        if suffix not in ("measurements.json.sig", "raw"):  # ECDSA signatures never repeat
            assert beside(again, suffix).read_bytes() == beside(signed, suffix).read_bytes()


# Keys


def test_keys_are_made_once(tmp_path: Path) -> None:
    first, made = keys.ensure(tmp_path / "keys")
    contents = {path.name: path.read_bytes() for path in first.folder.iterdir()}
    again, made_again = keys.ensure(tmp_path / "keys")
    assert (made, made_again) == (True, False)
    assert again == first
    assert {path.name: path.read_bytes() for path in first.folder.iterdir()} == contents
    assert first.folder.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in first.folder.glob("*.key"))
    certificate = keys.openssl("x509", "-in", first.secure_boot.public, "-noout", "-subject").decode()
    assert "generated TEST key" in certificate
    ten_years = str(10 * 366 * 86400)
    keys.openssl("x509", "-in", first.secure_boot.public, "-noout", "-checkend", ten_years)


def test_two_at_the_same_time_get_one_set(tmp_path: Path) -> None:
    environment = os.environ | {"AI_ASSISTANT_KEYS": str(tmp_path / "deep" / "keys")}
    command = ["image/keys", "--ensure", "--json"]
    both = [subprocess.Popen(command, cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    answers = [json.loads(each.communicate()[0]) for each in both]
    assert sorted(answer.pop("made") for answer in answers) == [False, True]
    assert answers[0] == answers[1]
    assert answers[0]["keys"]["pcr"] == {"public": "pcr.pub", "private": "pcr.key"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["keys"]


def test_keys_that_do_not_belong_together_are_refused(original: Unsigned, tmp_path: Path) -> None:
    where = tmp_path / "keys"
    shutil.copytree(original.keys.folder, where)
    shutil.copyfile(where / "pcr.key", where / "secure-boot.key")
    with pytest.raises(KeySetError, match=r"secure-boot\.key and secure-boot\.crt in .* are not one pair"):
        keys.load(where)
    (where / "secure-boot.key").write_text("nonsense")
    with pytest.raises(KeySetError, match="not readable as a private key"):
        keys.load(where)
    for path in where.glob("*.key"):
        path.unlink()
    with pytest.raises(KeySetError, match="half a key set"):
        keys.load(where)
    assert keys.load(where, private=False) is not None


def owned(folder: Path, name: str = "AI Assistant OS production") -> KeySet:
    """A set that is not of test keys, by its certificate's name."""
    made, _ = keys.ensure(folder)
    crt, key = made.secure_boot.public, str(made.secure_boot.private)
    keys.openssl("req", "-new", "-x509", "-key", key, "-subj", f"/CN={name}", "-days", "9", "-out", crt)
    found = keys.load(folder)
    assert found is not None
    return found


def test_test_keys_sign_every_profile(original: Unsigned, tmp_path: Path) -> None:
    for profile in PROFILES:
        keys.check_profile(original.keys, profile)
    made, _ = keys.ensure(tmp_path / "keys")
    (made.folder / "profile").write_text("test\n")  # unless their owner wants it otherwise
    keys.check_profile(made, "test")
    with pytest.raises(KeySetError, match="sign test images, not production ones"):
        keys.check_profile(made, "production")


def test_other_keys_sign_the_profile_that_their_owner_wrote_and_no_other(tmp_path: Path) -> None:
    found = owned(tmp_path / "keys")
    for profile in ("developer", "production"):
        with pytest.raises(KeySetError, match="does not say images of which profile") as caught:
            keys.check_profile(found, profile)
        assert f"echo {profile} >" in caught.value.hint
    (found.folder / "profile").write_text("production\n")
    keys.check_profile(found, "production")
    with pytest.raises(KeySetError, match="sign production images, not developer ones"):
        keys.check_profile(found, "developer")


@pytest.mark.parametrize("words", ["", "test", "production developer", "Production", "p" * 10_000, "\0", "\xff"])
def test_a_profile_that_is_none_is_named(tmp_path: Path, words: str) -> None:
    found = owned(tmp_path / "keys")
    (found.folder / "profile").write_bytes(words.encode("latin-1"))
    with pytest.raises(KeySetError, match="names no profile"):
        keys.check_profile(found, "production")


@pytest.mark.parametrize("name", ["AI Assistant OS production", f"not an {keys.TEST_KEY_NAME}", keys.TEST_KEY_NAME])
def test_a_test_image_is_signed_with_test_keys_only(unsigned: Unsigned, tmp_path: Path, name: str) -> None:
    found = owned(tmp_path / "keys", name)
    for said in (None, "production", "test"):
        if said:
            (found.folder / "profile").write_text(said)
        with pytest.raises(KeySetError, match="generated TEST keys only") as caught:
            sign(NAME, unsigned.folder, tmp_path / "output", found)
        assert "AI_ASSISTANT_KEYS" in caught.value.hint
    assert not (tmp_path / "output").exists()


# Keys in a token


@pytest.fixture
def token(original: Unsigned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KeySet:
    """The same keys in a SoftHSM token of its own."""
    where = tmp_path / "token"
    (where / "tokens").mkdir(parents=True)
    (where / "softhsm2.conf").write_text(f"directories.tokendir = {where}/tokens\nlog.level = ERROR\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(where / "softhsm2.conf"))
    monkeypatch.setenv("PKCS11_PROVIDER_MODULE", MODULE)
    monkeypatch.setenv("AI_ASSISTANT_PIN", "1234")
    run(["softhsm2-util", "--init-token", "--free", "--label=test", "--pin=1234", "--so-pin=5678"])
    folder = tmp_path / "keys"
    shutil.copytree(original.keys.folder, folder)
    for index, key in enumerate(original.keys.all):
        assert key.private is not None
        command = ["softhsm2-util", "--token=test", "--pin=1234", f"--label={key.role}", f"--id=0{index}"]
        run([*command, "--import", key.private])
        (folder / key.private.name).unlink()
        (folder / f"{key.role}.uri").write_text(f"pkcs11:token=test;object={key.role};type=private\n")
    found = keys.load(folder)
    assert found is not None
    assert all(key.in_token for key in found.all)
    return found


def test_a_token_signs_the_same(signed: Path, original: Unsigned, token: KeySet, tmp_path: Path) -> None:
    raw = sign(NAME, original.folder, tmp_path / "output", token)
    for suffix in ("efi", "measurements.json"):
        assert beside(raw, suffix).read_bytes() == beside(signed, suffix).read_bytes()


def test_a_wrong_pin_and_a_wrong_object_are_named(
    original: Unsigned, token: KeySet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert token.release.private is not None
    assert token.pcr.private is not None
    right = token.pcr.private.read_text()
    token.pcr.private.write_text(right.replace("object=pcr", "object=secure-boot"))
    with pytest.raises(KeySetError):
        sign(NAME, original.folder, tmp_path / "output", token)
    token.pcr.private.write_text(right)
    monkeypatch.setenv("AI_ASSISTANT_PIN", "4321")
    with pytest.raises(KeySetError, match="the token did not sign"):
        sign(NAME, original.folder, tmp_path / "output", token)
    assert not list((tmp_path / "output").glob("ai-assistant*"))


def test_a_key_in_a_token_needs_the_certificate_of_the_same_key(token: KeySet) -> None:
    shutil.copyfile(token.secure_boot.public, token.pcr.certificate)
    with pytest.raises(KeySetError, match=r"needs a certificate for pcr\.pub"):
        keys.load(token.folder)


# Bad input


def refused(unsigned: Unsigned, output: Path, error: type[SigningError], words: str) -> None:
    with pytest.raises(error, match=words):
        unsigned.sign(output)
    assert [path.name for path in output.iterdir()] == [".signing.lock"]


def test_a_missing_or_cut_disk_is_named(unsigned: Unsigned, tmp_path: Path) -> None:
    raw = unsigned.path("raw")
    os.truncate(raw, ESP_MIB * MIB // 2)
    refused(unsigned, tmp_path / "output", ImageError, "is cut short")
    raw.write_bytes(b"\0" * MIB)
    refused(unsigned, tmp_path / "output", ImageError, "no disk image")
    raw.unlink()
    refused(unsigned, tmp_path / "output", ImageError, "is not there\n  hint: make image")


def test_a_disk_without_an_esp_is_named(unsigned: Unsigned, tmp_path: Path) -> None:
    make_disk(unsigned.path("raw"), {}, esp=False)
    refused(unsigned, tmp_path / "output", ImageError, "no EFI system partition")


def test_no_uki_and_two_ukis_are_named(unsigned: Unsigned, tmp_path: Path) -> None:
    ESP(unsigned.path("raw")).write(unsigned.path("efi"), "/EFI/Linux/other.efi")
    refused(unsigned, tmp_path / "output", ImageError, "2 unified kernel images, not one: .*other")
    make_disk(unsigned.path("raw"), {LOADERS[0]: unsigned.path("efi")})
    refused(unsigned, tmp_path / "output", ImageError, "no unified kernel images")


def test_a_uki_that_is_not_the_one_on_the_disk_is_named(unsigned: Unsigned, tmp_path: Path) -> None:
    make_uki(unsigned.path("efi"), unsigned.keys.pcr.public, "--section=.extra:more")
    refused(unsigned, tmp_path / "output", ImageError, "is not the one inside")


def test_a_uki_for_another_key_or_none_is_named(unsigned: Unsigned, tmp_path: Path) -> None:
    other, _ = keys.ensure(tmp_path / "other")
    with pytest.raises(KeySetError, match="built for another PCR key"):
        sign(NAME, unsigned.folder, tmp_path / "output", other)
    make_uki(tmp_path / "new.efi", other.pcr.public)
    unsigned.replace_uki(tmp_path / "new.efi")
    refused(unsigned, tmp_path / "output", KeySetError, "built for another PCR key")


def test_a_uki_for_another_root_is_named(unsigned: Unsigned, tmp_path: Path) -> None:
    make_uki(tmp_path / "new.efi", unsigned.keys.pcr.public, f"--cmdline=roothash={'0' * 64}")
    unsigned.replace_uki(tmp_path / "new.efi")
    refused(unsigned, tmp_path / "output", ImageError, "vouches for another root")


def test_what_is_signed_already_is_refused(unsigned: Unsigned, signed: Path, tmp_path: Path) -> None:
    unsigned.replace_uki(beside(signed, "efi"))
    refused(unsigned, tmp_path / "output", ImageError, "is signed already")


def test_a_uki_too_big_for_the_esp_is_named(unsigned: Unsigned, tmp_path: Path) -> None:
    esp = ESP(unsigned.path("raw"))
    filler = tmp_path / "filler"
    filler.write_bytes(bytes((ESP_MIB - 5) * MIB))
    esp.write(filler, "/filler")
    # What is left holds the image as it is, and not the boot loader's signatures and the enrolment files.
    filler.write_bytes(bytes(4096))
    with pytest.raises(NoSpaceError, match=r"filler .* does not fit on the EFI system partition"):  # noqa: PT012
        for index in range(500):
            esp.write(filler, f"/filler{index}")
    refused(unsigned, tmp_path / "output", NoSpaceError, "does not fit on the EFI system partition of 42 MB")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    where = tmp_path / "small"
    where.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=6M", "tmpfs", where])
    yield where
    run(["umount", where])


def test_a_full_disk_is_named_and_left_clean(unsigned: Unsigned, small_disk: Path) -> None:
    refused(unsigned, small_disk, NoSpaceError, "space|free")


def test_killed_half_way_leaves_no_image_and_the_next_try_works(unsigned: Unsigned, tmp_path: Path) -> None:
    output = tmp_path / "output"
    unsigned.sign(output)
    program = [sys.executable, "-m", "image.signing", "sign", NAME.text, "--keys", str(unsigned.keys.folder)]
    command = [*program, "--unsigned", str(unsigned.folder), "--output", str(output)]
    before = beside(output / "x", "raw").stat().st_mtime_ns
    with subprocess.Popen(command, cwd=CHECKOUT, stderr=subprocess.DEVNULL, start_new_session=True) as running:
        # The disk is copied last, and its ESP written after that: here the new one is half signed.
        while not list(output.glob(".signing-*/*.raw")):
            assert running.poll() is None
            time.sleep(0.001)
        os.killpg(running.pid, signal.SIGKILL)
    assert list(output.glob(".signing-*/*"))
    assert beside(output / "x", "raw").stat().st_mtime_ns == before
    raw = unsigned.sign(output)
    assert not list(output.glob(".signing-*"))
    assert ESP(raw).has("/loader/keys/auto/PK.auth")
