"""Which disks there are, what they are, and what speaks against them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ai_assistant.provisioning.disks import Machine
from ai_assistant.provisioning.errors import DiskFailed, DiskInUse, DiskTooSmall, NoSuchDisk, NotADisk
from tests.provisioning.world import World

USB = "pci0/usb1/1-4/1-4:1.0/host6/block"


def test_a_disk_says_what_it_is(world: World) -> None:
    (world.root / "sys/devices/pci0/usb1/1-4").mkdir(parents=True)
    (world.root / "sys/devices/pci0/usb1/1-4/idVendor").write_text("0781\n")
    (world.root / "sys/devices/pci0/usb1/1-4/serial").write_text("4C53\n")
    world.disk("sda", 8 << 20, place=USB, device__vendor="SanDisk ", device__model="Ultra Fit  ", removable="1")
    world.disk("sdb", 8 << 20, device__vendor="ATA     ", device__model="Samsung SSD 870 ")
    (world.root / "sys/class/block/sdb/device/vpd_pg80").write_bytes(b"\0\x80\0\x08  S6Z2NF ")
    nvme = {"device__model": "WD_BLACK SN770", "device__serial": "2310", "queue__logical_block_size": "4096"}
    world.disk("nvme0n1", 8 << 20, place="pci0/nvme/nvme0", **nvme)
    world.disk("vda", 8 << 20, place="pci0/virtio1/block", device__vendor="0x1af4", serial="root")
    found = {disk.name: disk for disk in world.machine.disks()}
    about = {name: (disk.transport, disk.model, disk.serial) for name, disk in found.items()}
    assert about == {
        "sda": ("usb", "SanDisk Ultra Fit", "4C53"),
        "sdb": ("sata", "Samsung SSD 870", "S6Z2NF"),
        "nvme0n1": ("nvme", "WD_BLACK SN770", "2310"),
        "vda": ("virtio", "", "root"),
    }
    assert found["sda"].description == "0.0 GB SanDisk Ultra Fit (usb, serial 4C53)"
    assert found["sda"].removable
    assert found["nvme0n1"].sector_bytes == 4096
    assert found["vda"].size_bytes == 8 << 20
    assert not any(disk.reasons() for disk in found.values())


def test_only_disks_are_listed(world: World) -> None:
    world.disk("sda")
    world.partition("sda", 1)
    world.disk("sr0")
    world.disk("zram0")
    world.disk("mmcblk0", place="pci0/mmc0/block")
    world.disk("mmcblk0boot0", place="pci0/mmc0/block")
    world.disk("sdc", size=0)  # a card reader without a card
    world.loop("loop0", "/some/file")
    world.volume("dm-0", "root", "sda1")
    assert [disk.name for disk in world.machine.disks()] == ["mmcblk0", "sda"]


def test_what_is_mounted_where_is_said(world: World) -> None:
    sdb = world.disk("sdb")
    world.partition("sdb", 1)
    world.partition("sdb", 2)
    world.mount("sdb1", "/media/my\\040stick")
    world.swap("sdb2")
    disk = world.machine.disk(sdb)
    node = world.root / "dev"
    assert disk.uses == (f"{node}/sdb1 is mounted on /media/my stick", f"{node}/sdb2 is swap space")
    with pytest.raises(DiskInUse, match=r"sdb1 is mounted on /media/my stick; .*sdb2 is swap") as caught:
        disk.refuse()
    assert "unmount" in caught.value.hint
    disk.refuse(force=True)


def test_a_file_system_on_the_whole_disk_and_one_that_has_no_number(world: World) -> None:
    sdb, sdc = world.disk("sdb"), world.disk("sdc")
    world.partition("sdc", 1)
    world.mount("sdb", "/backup")
    world.mount("sdc1", "/btrfs", number="0:45")
    (world.root / "dev/sdc1").touch()
    assert "mounted on /backup" in world.machine.disk(sdb).uses[0]
    assert "sdc1 is mounted on /btrfs" in world.machine.disk(sdc).uses[0]


def test_mounts_of_the_first_process_count(world: World) -> None:
    sdb = world.disk("sdb")
    world.partition("sdb", 1)
    world.mount("sdb1", "/media/stick", process="1")
    assert world.machine.disk(sdb).uses


def test_volumes_are_followed_upwards(world: World) -> None:
    """A partition is an encrypted volume, on which LVM stands, of which one volume is mounted."""
    sdb = world.disk("sdb")
    part = world.partition("sdb", 3)
    crypt = world.volume("dm-0", "luks-home", part)
    world.volume("dm-1", "vg-home", crypt)
    world.volume("dm-2", "vg-spare", crypt)
    world.mount("dm-1", "/home")
    assert world.machine.disk(sdb).uses == (
        "/dev/mapper/vg-home is mounted on /home",
        "/dev/mapper/luks-home is part of /dev/mapper/vg-spare",
    )


def test_raid_members_and_loops_are_in_use(world: World) -> None:
    sdb, sdc = world.disk("sdb"), world.disk("sdc")
    world.volume("md0", "", "sdb")
    world.loop("loop3", "/dev/sdc")
    assert "part of" in world.machine.disk(sdb).uses[0]
    assert "md0" in world.machine.disk(sdb).uses[0]
    assert "attached to" in world.machine.disk(sdc).uses[0]


def test_the_system_disk_is_found_below_volumes(world: World) -> None:
    sda, sdb, sdc = world.disk("sda"), world.disk("sdb"), world.disk("sdc")
    esp, root = world.partition("sda", 1), world.partition("sda", 2)
    world.volume("dm-0", "root", root)
    world.mount("dm-0", "/")
    world.mount(esp, "/boot/efi")
    world.loop("loop0", "/srv/usr.img")  # /usr is a file on another disk
    world.mount(world.partition("sdb", 1), "/srv")
    world.mount("loop0", "/usr")
    assert world.machine.disk(sda).system == ("/", "/boot/efi")
    assert world.machine.disk(sdb).system == ("/usr",)
    assert world.machine.disk(sdc).system == ()
    with pytest.raises(DiskInUse, match=r"this system runs from \(/, /boot/efi\)"):
        world.machine.disk(sda).refuse()


def test_a_partition_names_its_disk(world: World) -> None:
    world.disk("nvme0n1")
    part = world.partition("nvme0n1", 2)
    with pytest.raises(NotADisk) as caught:
        world.machine.disk(world.root / "dev" / part)
    assert caught.value.hint == f"give the whole disk: {world.root}/dev/nvme0n1"


def test_what_is_no_disk(world: World, tmp_path: Path) -> None:
    world.disk("sda")
    world.volume("dm-0", "vg-home", "sda")
    for wrong in ("mapper/vg-home", "dm-0", "."):
        with pytest.raises(NotADisk):
            world.machine.disk(world.root / "dev" / wrong)
    for missing in ("sdz", "sda/x", "a\0b", "x" * 5000):
        with pytest.raises(NoSuchDisk):
            world.machine.disk(world.root / "dev" / missing)
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(NoSuchDisk):
        world.machine.disk(tmp_path / "circle")
    os.mkfifo(tmp_path / "pipe")
    for real in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(NotADisk):
            Machine().disk(real)


def test_links_lead_to_the_disk(world: World) -> None:
    world.disk("sdb")
    disk = world.machine.disk(world.link("usb-SanDisk_Ultra-0:0", "sdb"))
    assert (disk.name, disk.path) == ("sdb", world.root / "dev/sdb")


def test_a_file_serves_as_a_disk_unless_it_is_attached(world: World, tmp_path: Path) -> None:
    file = tmp_path / "disk.raw"
    file.write_bytes(bytes(8192))
    disk = world.machine.disk(file)
    assert (disk.size_bytes, disk.transport, disk.reasons()) == (8192, "file", [])
    world.loop("loop0", file)
    assert "attached to" in world.machine.disk(file).reasons()[0]


def test_too_small_and_write_protected(world: World) -> None:
    small, locked = world.disk("sda", 1 << 20), world.disk("sdb", ro="1")
    with pytest.raises(DiskTooSmall, match="1,048,576 bytes, and 1,048,577 are needed"):
        world.machine.disk(small).refuse(1_048_577, force=True)
    with pytest.raises(DiskFailed, match="write-protected"):
        world.machine.disk(locked).refuse(force=True)
    assert len(world.machine.disk(locked).reasons(1 << 40)) == 2


def test_this_machine_can_be_looked_at() -> None:
    """Whatever the tests run on: nothing here may fail, and the disk of / is in use."""
    for disk in Machine().disks():
        assert disk.size_bytes > 0
        if "/" in disk.system:
            assert disk.uses
