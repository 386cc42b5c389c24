"""Signing, as far as it needs no tools: keys by name, PE files, partition tables, variables and PINs."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
from pathlib import Path

import pytest

from image.signing import keys, measure, tools, variables
from image.signing.errors import ImageError, KeySetError, SigningError, ToolError
from image.signing.esp import ESP_TYPE, parse
from image.signing.keys import Key
from image.signing.pe import PE
from image.signing.sign import Name, check_kept

CHECKOUT = Path(__file__).resolve().parents[2]
ALIGNMENT = 512
HEADERS = 1024


def program(*sections: tuple[str, bytes], signature: bytes = b"", checksum: int = 0) -> bytes:
    """A PE32+ file with the fields that Secure Boot looks at."""
    count = len(sections)
    head = bytearray(HEADERS)
    head[0:2] = b"MZ"
    struct.pack_into("<I", head, 0x3C, 64)
    struct.pack_into("<4sHHIIIHH", head, 64, b"PE\0\0", 0x8664, count, 0, 0, 0, 112 + 16 * 8, 0x22)
    struct.pack_into("<H", head, 88, 0x20B)
    struct.pack_into("<I", head, 88 + 60, HEADERS)
    struct.pack_into("<I", head, 88 + 64, checksum)
    struct.pack_into("<I", head, 88 + 108, 16)
    body = bytearray()
    for index, (name, content) in enumerate(sections):
        padded = content + bytes(-len(content) % ALIGNMENT)
        at = 88 + 112 + 128 + 40 * index
        struct.pack_into("<8sIIII", head, at, name.encode(), len(content), 0x1000 * (index + 1), len(padded), 0)
        struct.pack_into("<I", head, at + 20, HEADERS + len(body))
        body += padded
    if signature:
        struct.pack_into("<II", head, 88 + 112 + 4 * 8, HEADERS + len(body), len(signature))
    return bytes(head) + bytes(body) + signature


def test_sections_come_without_their_padding() -> None:
    pe = PE(program((".osrel", b"ID=test\n"), (".linux", b"k" * 700)), "uki")
    assert pe.names() == [".osrel", ".linux"]
    assert pe.content(".osrel") == b"ID=test\n"
    assert pe.content(".linux") == b"k" * 700
    assert pe.find(".initrd") is None
    with pytest.raises(ImageError, match=r"uki has no section \.initrd"):
        pe.content(".initrd")


def test_the_authenticode_hash_leaves_out_what_signing_changes() -> None:
    plain = program((".linux", b"kernel"))
    signed = program((".linux", b"kernel"), signature=b"s" * 64, checksum=77)
    assert PE(signed, "signed").signed
    assert PE(plain, "plain").authenticode() == PE(signed, "signed").authenticode()
    assert PE(program((".linux", b"colonel")), "other").authenticode() != PE(plain, "plain").authenticode()
    # Recomputed from the definition: three fields are left out.
    kept = plain[: 88 + 64] + plain[88 + 68 : 88 + 112 + 32] + plain[88 + 112 + 40 :]
    assert PE(plain, "plain").authenticode() == hashlib.sha256(kept).digest()


@pytest.mark.parametrize("length", [0, 1, 63, 70, 100, 300, 1023, 1100])
def test_a_program_cut_short_is_named(length: int) -> None:
    with pytest.raises(ImageError):
        PE(program((".linux", b"k" * 700))[:length], "uki")


def test_a_signature_behind_the_end_is_named() -> None:
    with pytest.raises(ImageError, match="its signature lies behind its end"):
        PE(program((".linux", b"k"), signature=b"s" * 64)[:-1], "uki")


def test_what_is_no_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no EFI program"):
        PE(b"\x7fELF" + bytes(600), "uki")
    with pytest.raises(ImageError, match="make image"):
        PE.read(tmp_path / "missing.efi")


def test_a_section_that_got_lost_or_changed_is_seen() -> None:
    before = PE(program((".osrel", b"a"), (".linux", b"k")), "uki")
    check_kept(before, PE(program((".osrel", b"a"), (".linux", b"k"), (".pcrsig", b"{}")), "uki"), ".pcrsig")
    for sections in (
        [(".linux", b"k"), (".osrel", b"a"), (".pcrsig", b"{}")],
        [(".osrel", b"a"), (".pcrsig", b"{}")],
        [(".osrel", b"b"), (".linux", b"k"), (".pcrsig", b"{}")],
        [(".osrel", b"a"), (".linux", b"k")],
    ):
        with pytest.raises(ImageError, match=r"adding \.pcrsig changed"):
            check_kept(before, PE(program(*sections), "uki"), ".pcrsig")


def test_sections_are_measured_in_the_stubs_order() -> None:
    names = (".sbat", ".osrel", ".pcrpkey", ".linux", ".sbom", ".cmdline", ".pcrsig", ".ucode", ".initrd", ".uname")
    uki = PE(program(*((name, name.encode()) for name in names)), "uki")
    expected = [".linux", ".osrel", ".cmdline", ".initrd", ".ucode", ".uname", ".sbat", ".pcrpkey"]
    assert measure.measured(uki) == expected
    with pytest.raises(ImageError, match="not one value"):
        measure.measured(PE(program((".cmdline", b"a"), (".cmdline", b"b")), "uki"))


@pytest.mark.parametrize("cmdline", [b"quiet", b"roothash=12ab", b"roothash=" + b"0" * 64 + b" roothash=" + b"1" * 64])
def test_a_command_line_without_one_root_hash_is_named(cmdline: bytes) -> None:
    with pytest.raises(ImageError, match="no root hash"):
        measure.root_hash(PE(program((".cmdline", cmdline + b"\0")), "uki"))


def table(**changes: object) -> dict[str, object]:
    partition = {"type": ESP_TYPE, "uuid": "1A6E4ED3-DA1F-4C59-A8B7-771FE51A208A", "start": 2048, "size": 1000}
    return {"label": "gpt", "sectorsize": 512, "partitions": [partition]} | changes


def test_partitions_are_in_bytes() -> None:
    (found,) = parse(table(), 10**7, "disk.raw")
    assert (found.offset, found.size) == (2048 * 512, 1000 * 512)
    assert found.uuid == "1a6e4ed3da1f4c59a8b7771fe51a208a"


def test_a_disk_cut_short_or_without_gpt_is_named() -> None:
    with pytest.raises(ImageError, match="cut short"):
        parse(table(), 3048 * 512 - 1, "disk.raw")
    with pytest.raises(ImageError, match="no whole GPT"):
        parse(table(label="dos"), 10**7, "disk.raw")


def test_names_are_taken_apart() -> None:
    name = Name.parse("ai-assistant-production_0.1.0_x86-64")
    assert (name.profile, name.version, name.architecture) == ("production", "0.1.0", "x86-64")
    assert Name.parse("ai-assistant_2.0~rc1_x86-64").profile == "developer"
    assert Name.of("developer", "0.1.0").text == "ai-assistant_0.1.0_x86-64"
    for wrong in ("", "debian_1_x86-64", "../ai-assistant_1_x86-64", "ai-assistant_1/2_x86-64"):
        with pytest.raises(ImageError, match="no name of an image"):
            Name.parse(wrong)


def test_digests_of_variables_are_those_of_a_real_machine() -> None:
    # From the event logs of OVMF: no platform key, and Secure Boot on.
    empty = "dea7b80ab53a3daaa24d5cc46c64e1fa9ffd03739f90aadbd8c0867c4a5b4890"
    enabled = "ccfc4bb32888a345bc8aeadaba552b627d99348c767681ab3141f5b01e40a40e"
    assert variables.event_digest("PK", b"") == empty
    assert variables.event_digest("SecureBoot", b"\x01") == enabled


def test_where_the_keys_are() -> None:
    assert keys.folder({"HOME": "/home/a"}) == Path("/home/a/.config/ai-assistant/keys")
    assert keys.folder({"HOME": "/home/a", "XDG_CONFIG_HOME": "/c"}) == Path("/c/ai-assistant/keys")
    assert keys.folder({"HOME": "/home/a", "AI_ASSISTANT_KEYS": "/mine"}) == Path("/mine")


def test_the_script_agrees_and_makes_nothing_to_say_so(tmp_path: Path) -> None:
    for environment in ({"XDG_CONFIG_HOME": str(tmp_path)}, {"AI_ASSISTANT_KEYS": str(tmp_path / "x/../mine")}):
        told = environment | {"HOME": "/home/a", "PATH": os.environ["PATH"]}
        done = subprocess.run([CHECKOUT / "image/keys", "--path"], env=told, capture_output=True, text=True, check=True)
        assert Path(done.stdout.strip()) == Path(os.path.normpath(keys.folder(told)))
    assert not list(tmp_path.iterdir())


def test_no_keys_are_none_and_half_a_set_is_refused(tmp_path: Path) -> None:
    assert keys.load(tmp_path) is None
    assert keys.load(tmp_path / "missing") is None
    for name in ("secure-boot.crt", "secure-boot.key", "pcr.pub", "pcr.uri", "release.pub"):
        (tmp_path / name).write_text("x")
    with pytest.raises(KeySetError, match=r"half a key set in .*: no release\.key"):
        keys.load(tmp_path)
    (tmp_path / "pcr.key").write_text("x")
    with pytest.raises(KeySetError, match=r"both pcr\.key and pcr\.uri"):
        keys.load(tmp_path)


def test_a_folder_of_other_things_gets_no_keys(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(KeySetError, match="holds no keys but other things"):
        keys.ensure(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def in_token(folder: Path, uri: str) -> Key:
    path = folder / "release.uri"
    path.write_text(uri)
    return Key("release", folder / "release.pub", path)


@pytest.mark.parametrize("text", ["", "file:///key", "pkcs11:a\npkcs11:b"])
def test_a_uri_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(KeySetError, match="holds no PKCS#11 URI"):
        in_token(tmp_path, text).uri()


@pytest.mark.parametrize("given", ["uri", "environment"])
def test_a_pin_is_not_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("PKCS11_PROVIDER_MODULE", "/module.so")
    monkeypatch.delenv("AI_ASSISTANT_PIN", raising=False)
    monkeypatch.delenv("OPENSSL_CONF", raising=False)
    uri = "pkcs11:token=t;object=o"
    if given == "uri":
        uri += "?pin-value=12%2034"
    else:
        monkeypatch.setenv("AI_ASSISTANT_PIN", "12 34")
    with tools.usable(in_token(tmp_path, uri)) as used:
        assert used.word.startswith("pkcs11:token=t;object=o?pin-source=file:/proc/self/fd/")
        assert "34" not in used.word.partition("?")[2].partition("fd/")[0]
        source = Path(used.word.partition("pin-source=file:")[2])
        assert source.read_text() == "12 34"
        assert "pkcs11-module-path = /module.so" in Path(used.environment["OPENSSL_CONF"]).read_text()
        descriptors = list(used.descriptors)
    for each in descriptors:  # closed with the context
        assert not Path(f"/proc/self/fd/{each}").exists()


def test_a_token_without_a_module_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PKCS11_PROVIDER_MODULE", raising=False)
    with pytest.raises(KeySetError, match="no PKCS#11 module"), tools.usable(in_token(tmp_path, "pkcs11:object=o")):
        pass


def test_without_the_library_that_stops_the_clock_nothing_is_signed(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="libfaketime is not there"):
        tools.frozen_clock(tmp_path)
    library = tmp_path / "x86_64-linux-gnu" / "faketime" / "libfaketime.so.1"
    library.parent.mkdir(parents=True)
    library.touch()
    assert tools.frozen_clock(tmp_path)["LD_PRELOAD"] == str(library)


def test_an_error_has_a_name_and_a_hint() -> None:
    assert str(KeySetError("no keys", "make keys")) == "KeySetError: no keys\n  hint: make keys"
    assert str(SigningError("what")) == "SigningError: what"
