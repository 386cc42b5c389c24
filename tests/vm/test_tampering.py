"""Somebody has changed what is on the disk: it does not start, and says why; or it starts, and verify-boot names it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from image.vm import VM, Disk
from image.vm.process import tool
from tests.vm.conftest import Installed, verify_boot

pytestmark = pytest.mark.vm_long

BOOT_LOADER = "EFI/BOOT/BOOTX64.EFI"
VERITY_SAYS = ("is corrupted", "dm-verity device has I/O error", "dm-verity device corrupted")
FIRMWARE_SAYS = ("Access Denied", "Security Violation")
LOADER_SAYS = ("Access denied", "Security violation", "Security policy violation")
EROFS_SUPERBLOCK = 1024
VERITY_TREE = 4096  # its top, right behind its superblock


def flipped_bit_in_root(disk: Disk) -> None:
    disk.flip_bit("root", EROFS_SUPERBLOCK)


def flipped_bit_in_the_verity_tree(disk: Disk) -> None:
    disk.flip_bit("root-verity", VERITY_TREE)


def another_root(disk: Disk) -> None:
    """Another root file system with a whole verity tree of its own, where the first slot's are looked for."""
    root, tree = disk.partition("root"), disk.partition("root-verity")
    spare_root, spare_tree = (each for each in disk.table().partitions if each.label == "_empty")
    held, hashes = disk.path.parent / "root", disk.path.parent / "tree"
    held.write_bytes(disk.read(root.start, root.size))
    with held.open("r+b") as file:
        file.seek(root.size - 4096)
        file.write(b"another" * 100)
    tool("veritysetup", "format", held, hashes)
    disk.fill_partition(spare_root.number, held)
    disk.fill_partition(spare_tree.number, hashes)
    disk.swap_partitions(root.number, spare_root.number)
    disk.swap_partitions(tree.number, spare_tree.number)


@pytest.mark.parametrize("tamper", [flipped_bit_in_root, flipped_bit_in_the_verity_tree, another_root])
def test_a_root_that_is_not_the_published_one_does_not_start(
    installed: Installed, tamper: Callable[[Disk], None]
) -> None:
    with installed.copy() as machine:
        tamper(machine.disk)
        machine.power_on()
        machine.wait_for_console(*VERITY_SAYS, "cannot start from this disk")
        assert "login:" not in machine.console.text


def change_one_letter(before: bytes, at: bytes) -> bytes:
    """In a text that nothing depends on."""
    assert at in before
    return before.replace(at, at[:-1] + bytes([at[-1] ^ 1]), 1)


def test_a_flipped_bit_in_the_kernel_image_is_refused_with_secure_boot(installed: Installed) -> None:
    with installed.copy() as machine:
        machine.disk.change_esp_file(machine.disk.kernel(), lambda data: change_one_letter(data, b"PRETTY_NAME="))
        machine.power_on()
        machine.wait_for_console(*LOADER_SAYS, *FIRMWARE_SAYS)
        assert "login:" not in machine.console.text


def test_a_flipped_bit_in_the_kernel_image_is_named_without_secure_boot(
    installed_without_secure_boot: Installed,
) -> None:
    with installed_without_secure_boot.copy() as machine:
        machine.disk.change_esp_file(machine.disk.kernel(), lambda data: change_one_letter(data, b"PRETTY_NAME="))
        open_with_recovery_key(machine, installed_without_secure_boot.recovery_key)
        code, words = verify_boot(machine)
        assert code == 1
        assert differs(words, "unified kernel image")


def test_a_flipped_bit_in_the_boot_loader_is_refused_with_secure_boot(installed: Installed) -> None:
    with installed.copy() as machine:
        machine.disk.change_esp_file(BOOT_LOADER, lambda data: change_one_letter(data, b"#### LoaderInfo: systemd"))
        machine.power_on()
        machine.wait_for_console(*FIRMWARE_SAYS)
        assert "login:" not in machine.console.text


def test_a_flipped_bit_in_the_boot_loader_is_named_without_secure_boot(
    installed_without_secure_boot: Installed,
) -> None:
    with installed_without_secure_boot.copy() as machine:
        machine.disk.change_esp_file(BOOT_LOADER, lambda data: change_one_letter(data, b"#### LoaderInfo: systemd"))
        machine.power_on()
        machine.wait_ready()
        code, words = verify_boot(machine)
        assert code == 1
        assert differs(words, "boot loader")


def open_with_recovery_key(machine: VM, key: str) -> None:
    """On, and ready, with the key where the TPM does not open: it does not for another kernel image."""
    machine.power_on()
    machine.wait_for_console("stays closed")
    machine.wait_for_console("Recovery key:")
    machine.type_on_console(key)
    machine.wait_ready()


def differs(words: str, what: str) -> bool:
    """Whether the row that begins with `what` says so."""
    return re.search(rf"^{re.escape(what)}\b.*\bdiffers\b", words, re.MULTILINE) is not None


def unsigned(file: Path) -> None:
    tool("sbattach", "--remove", file)


def signed_by_somebody_else(file: Path) -> None:
    key, certificate = file.with_suffix(".key"), file.with_suffix(".crt")
    tool(
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-noenc", "-days", "3650", "-subj", "/CN=somebody else"),
        *("-keyout", key, "-out", certificate),
    )
    unsigned(file)
    tool("sbsign", "--key", key, "--cert", certificate, "--output", file, file)


@pytest.mark.parametrize("tamper", [unsigned, signed_by_somebody_else])
@pytest.mark.parametrize("which", ["kernel image", "boot loader"])
def test_without_our_signature_nothing_starts(
    installed: Installed, tmp_path: Path, tamper: Callable[[Path], None], which: str
) -> None:
    with installed.copy() as machine:
        name = BOOT_LOADER if which == "boot loader" else machine.disk.kernel()
        machine.disk.esp_copy_out(name, tmp_path / "file.efi")
        tamper(tmp_path / "file.efi")
        machine.disk.esp_copy_in(tmp_path / "file.efi", name)
        machine.power_on()
        machine.wait_for_console(*LOADER_SAYS, *FIRMWARE_SAYS)
        assert "login:" not in machine.console.text


def test_words_added_to_the_command_line_are_named_without_secure_boot(
    installed_without_secure_boot: Installed,
) -> None:
    with installed_without_secure_boot.copy(cmdline="audit=0") as machine:
        machine.power_on()
        machine.wait_ready()
        code, words = verify_boot(machine)
        assert code == 1
        assert differs(words, "additions to the command line") or differs(words, "command line of the running kernel")
