"""GPUs and NPUs on PCI and of device trees: what they are, and what keeps them from working."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest

from ai_assistant.hal.detect import detect
from ai_assistant.hal.device import Device, DeviceKind, DriverState
from tests.hal.detect.fake import FakeMachine

NPU = ("0000:00:0b.0", "8086:7d1d", "0x120000")


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def only(machine: FakeMachine, kind: DeviceKind) -> Device:
    found = [device for device in detect(machine.root) if device.kind is kind]
    assert len(found) == 1, found
    return found[0]


def npu(machine: FakeMachine) -> Device:
    return only(machine, DeviceKind.NPU)


def gpu(machine: FakeMachine) -> Device:
    return only(machine, DeviceKind.GPU)


def test_a_working_npu_has_its_name_node_and_figure(machine: FakeMachine) -> None:
    folder = machine.pci(*NPU, driver="intel_vpu", max_link_speed="16.0 GT/s PCIe", max_link_width="4")
    machine.node(folder, "accel", "accel0", "accel/accel0")
    found = npu(machine)
    assert found.state is DriverState.WORKING
    assert found.hint == ""
    assert found.id == "npu_pci_0000_00_0b_0"
    assert (found.name, found.vendor) == ("Intel AI Boost NPU (Meteor Lake)", "Intel")
    assert (found.bus, found.address, found.vendor_id, found.product_id) == ("pci", "0000:00:0b.0", "8086", "7d1d")
    assert (found.driver, found.nodes) == ("intel_vpu", ("/dev/accel/accel0",))
    assert found.attributes["pcie_gt_s"] == 16.0
    assert found.attributes["pcie_lanes"] == 4
    assert str(found.throughput[0]) == "11 TOPS int8, datasheet"
    assert found.throughput[0].reference.startswith("https://")


def test_without_a_driver_the_hint_names_the_module_that_the_kernel_has(machine: FakeMachine) -> None:
    machine.pci(*NPU, modalias="pci:v00008086d00007D1Dsv00001043sd000017F3bc12sc00i00")
    machine.aliases("pci:v00008086d00007D1Dsv*sd*bc*sc*i* intel_vpu", "pci:v00008086d000064A0sv*sd*bc03sc*i* xe")
    found = npu(machine)
    assert found.state is DriverState.NO_DRIVER
    assert "modprobe intel_vpu" in found.hint
    # The firmware is not there either: said in the same breath, not after the next restart.
    assert "firmware-intel-misc" in found.hint
    machine.write("lib/firmware/intel/vpu/vpu_37xx_v1.bin.zst", "x")
    assert "firmware" not in npu(machine).hint


def test_a_kernel_older_than_the_driver_is_named_as_the_reason(machine: FakeMachine) -> None:
    machine.pci("0000:c6:00.1", "1022:17f0", "0x118000", modalias="pci:v00001022d000017F0sv0sd0bc11sc80i00")
    machine.aliases("pci:v00008086d00007D1Dsv*sd*bc*sc*i* intel_vpu")
    found = npu(machine)
    assert found.state is DriverState.NO_DRIVER
    assert "amdxdna came with Linux 6.14" in found.hint
    assert "6.12.41" in found.hint
    machine.write("proc/sys/kernel/osrelease", "6.16.3+deb13-amd64\n")
    assert "modprobe amdxdna" in npu(machine).hint


def test_a_driver_that_refused_the_device_for_want_of_firmware(machine: FakeMachine) -> None:
    machine.pci(*NPU)
    machine.module("intel_vpu")
    found = npu(machine)
    assert found.state is DriverState.FIRMWARE_MISSING
    assert "firmware-intel-misc" in found.hint
    assert "intel/vpu/vpu_37xx_v1.bin" in found.hint


def test_a_driver_that_has_the_device_but_made_no_node(machine: FakeMachine) -> None:
    machine.pci(*NPU, driver="intel_vpu")
    assert npu(machine).state is DriverState.FIRMWARE_MISSING
    # With the firmware there it is something else, and is not called missing firmware.
    machine.write("lib/firmware/intel/vpu/vpu_37xx_v0.0.bin.xz", "x")
    found = npu(machine)
    assert found.state is DriverState.NO_DRIVER
    assert "journalctl" in found.hint


def test_the_kernels_log_says_which_firmware(machine: FakeMachine) -> None:
    machine.pci(*NPU)
    machine.module("intel_vpu")
    machine.write("lib/firmware/intel/vpu/vpu_37xx_v1.bin", "of another version")
    machine.write(
        "dev/kmsg",
        "4,2,3,-;intel_vpu 0000:00:0b.0: Direct firmware load for intel/vpu/vpu_37xx_v9.bin failed with error -2\n"
        "6,1,2,-;other 0000:00:02.0: Direct firmware load for i915/x.bin failed with error -2\n",
    )
    found = npu(machine)
    assert found.state is DriverState.FIRMWARE_MISSING
    assert "vpu_37xx_v9.bin" in found.hint


def test_firmware_that_is_chosen_by_revision(machine: FakeMachine) -> None:
    folder = machine.pci("0000:c6:00.1", "1022:17f0", "0x118000", revision="0x11")
    machine.module("amdxdna")
    machine.write("lib/firmware/amdnpu/17f0_10/npu.sbin.zst", "of another revision")
    found = npu(machine)
    assert found.state is DriverState.FIRMWARE_MISSING
    assert "amdnpu/17f0_11/npu.sbin" in found.hint
    # Where the revision says nothing, any of them may be the right one.
    for revision in ("0x10", "0x20", "", "0x", "0xff", "a\0b"):
        (folder / "revision").write_text(f"{revision}\n")
        assert npu(machine).state is DriverState.NO_DRIVER


def test_a_gpu_that_no_table_knows_gets_its_package_from_the_module_that_takes_it(machine: FakeMachine) -> None:
    machine.pci("0000:01:00.0", "1002:6fff", "0x030000", modalias="pci:v00001002d00006FFFsv0sd0bc03sc00i00")
    machine.aliases("pci:v00001002d00006FFFsv*sd*bc*sc*i* amdgpu")
    machine.module("amdgpu")
    found = gpu(machine)
    assert found.state is DriverState.FIRMWARE_MISSING
    assert "firmware-amd-graphics" in found.hint


def test_debians_own_wording_in_the_log(machine: FakeMachine) -> None:
    machine.pci(*NPU)
    machine.module("intel_vpu")
    machine.write("lib/firmware/intel/vpu/vpu_37xx_v1.bin", "x")
    machine.write("dev/kmsg", "3,2,3,-;intel_vpu 0000:00:0b.0: firmware: failed to load intel/vpu/a.bin (-2)\n")
    assert "intel/vpu/a.bin" in npu(machine).hint


def test_firmware_that_debian_13_does_not_have_yet(machine: FakeMachine) -> None:
    machine.pci("0000:00:0b.0", "8086:b03e", "0x120000")
    machine.module("intel_vpu")
    machine.write("lib/firmware/intel/vpu/vpu_37xx_v1.bin", "of an older NPU")
    assert "backports" in npu(machine).hint


def test_a_device_handed_to_a_virtual_machine_is_held(machine: FakeMachine) -> None:
    machine.pci(*NPU, driver="vfio-pci")
    found = npu(machine)
    assert found.state is DriverState.HELD_BY_ANOTHER
    assert "vfio-pci" in found.hint


def test_a_node_that_is_not_ours(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = machine.pci(*NPU, driver="intel_vpu")
    machine.node(folder, "accel", "accel0", "accel/accel0")
    # Tests run as root, whom access() refuses nothing.
    monkeypatch.setattr(os, "access", lambda path, mode: "accel0" not in str(path))
    found = npu(machine)
    assert found.state is DriverState.NO_PERMISSION
    assert "group render" in found.hint


def test_permission_as_another_user_sees_it() -> None:
    if os.getuid() != 0:
        pytest.skip("needs root to become somebody else")
    # pytest's own folders are closed to others.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        machine = FakeMachine(Path(folder))
        card = machine.pci(*NPU, driver="intel_vpu")
        machine.node(card, "accel", "accel0", "accel/accel0")
        (machine.root / "dev/accel/accel0").chmod(0o666)
        assert _as_nobody(machine) == DriverState.WORKING
        (machine.root / "dev/accel/accel0").chmod(0o600)
        assert _as_nobody(machine) == DriverState.NO_PERMISSION


def _as_nobody(machine: FakeMachine) -> str:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os.write(writer, npu(machine).state.encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as answer:
        return answer.read()


def test_a_node_that_a_container_was_not_given(machine: FakeMachine) -> None:
    folder = machine.pci(*NPU, driver="intel_vpu")
    machine.node(folder, "accel", "accel0", "accel/accel0")
    (machine.root / "dev/accel/accel0").unlink()
    found = npu(machine)
    assert found.state is DriverState.NO_PERMISSION
    assert "container" in found.hint


def test_an_exclusive_node_that_another_program_has_open(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = machine.pci("0000:01:00.0", "1da3:1020", "0x120000", driver="habanalabs")
    machine.node(folder, "accel", "accel0", "accel/accel0")
    machine.node(folder, "accel", "accel_controlD0", "accel/accel_controlD0")
    assert npu(machine).state is DriverState.WORKING
    really = os.open

    def busy(path: object, flags: int, *rest: int) -> int:
        if str(path).endswith("accel0") and flags & os.O_RDWR:
            raise OSError(errno.EBUSY, "busy")
        return really(path, flags, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", busy)
    found = npu(machine)
    assert found.state is DriverState.HELD_BY_ANOTHER
    assert found.nodes == ("/dev/accel/accel0",)


def test_an_accelerator_that_no_table_knows(machine: FakeMachine) -> None:
    machine.pci("0000:01:00.0", "abcd:1234", "0x120000")
    found = npu(machine)
    assert found.name == "NPU abcd:1234"
    assert found.state is DriverState.NO_DRIVER
    assert found.hint


def test_an_unknown_card_with_a_node_of_the_subsystem_is_one_too(machine: FakeMachine) -> None:
    folder = machine.pci("0000:01:00.0", "abcd:1234", "0xff0000", driver="novel")
    machine.node(folder, "accel", "accel3", "accel/accel3")
    found = npu(machine)
    assert (found.driver, found.nodes, found.state) == ("novel", ("/dev/accel/accel3",), DriverState.WORKING)


def test_hailo_and_coral_say_where_their_drivers_come_from(machine: FakeMachine) -> None:
    machine.pci("0000:01:00.0", "1e60:2864", "0x120000")
    machine.pci("0000:02:00.0", "1ac1:089a", "0x088000")
    hailo, coral = (device for device in detect(machine.root) if device.kind is DeviceKind.NPU)
    assert "hailort" in hailo.hint
    assert "gasket" in coral.hint


def test_nodes_of_hailo_and_coral(machine: FakeMachine) -> None:
    folder = machine.pci("0000:01:00.0", "1e60:2864", "0x120000", driver="hailo")
    machine.node(folder, "hailo_chardev", "hailo0", "hailo0")
    folder = machine.pci("0000:02:00.0", "1ac1:089a", "0x088000", driver="apex")
    machine.node(folder, "apex", "apex_0", "apex_0")
    found = [device for device in detect(machine.root) if device.kind is DeviceKind.NPU]
    assert [device.nodes for device in found] == [("/dev/hailo0",), ("/dev/apex_0",)]
    assert all(device.usable for device in found)


def test_an_amd_gpu_with_its_memory(machine: FakeMachine) -> None:
    folder = machine.pci(
        "0000:c5:00.0",
        "1002:150e",
        "0x030000",
        driver="amdgpu",
        mem_info_vram_total=str(1 << 30),
        mem_info_gtt_total=str(12 << 30),
        boot_vga="1",
    )
    machine.node(folder, "drm", "card1", "dri/card1")
    machine.node(folder, "drm", "renderD128", "dri/renderD128")
    found = gpu(machine)
    assert found.nodes == ("/dev/dri/renderD128",)
    assert found.name == "Radeon 880M / 890M (Strix)"
    assert found.attributes["memory_bytes"] == 1 << 30
    assert found.attributes["shared_memory_bytes"] == 12 << 30
    assert found.attributes["compute"] is True
    assert found.attributes["primary"] is True
    assert found.state is DriverState.WORKING


@pytest.mark.parametrize(
    ("ids", "module", "package"),
    [
        ("1002:150e", "amdgpu", "firmware-amd-graphics"),
        ("8086:64a0", "xe", "firmware-intel-graphics"),
        ("8086:46d1", "i915", "firmware-intel-graphics"),
    ],
)
def test_gpus_without_firmware(machine: FakeMachine, ids: str, module: str, package: str) -> None:
    machine.pci("0000:00:02.0", ids, "0x030000")
    machine.module(module)
    found = gpu(machine)
    assert found.state is DriverState.FIRMWARE_MISSING
    assert f"install {package}" in found.hint


def test_nouveau_without_firmware_on_a_card_that_no_table_has(machine: FakeMachine) -> None:
    machine.pci("0000:01:00.0", "10de:2786", "0x030000", driver="nouveau")
    found = gpu(machine)
    assert found.state is DriverState.FIRMWARE_MISSING
    assert "firmware-nvidia-graphics" in found.hint
    # What another package has for other chips does not count.
    machine.write("lib/firmware/nvidia/tegra186/xusb.bin", "x")
    assert gpu(machine).state is DriverState.FIRMWARE_MISSING
    assert found.vendor == "NVIDIA"


def test_nvidias_own_driver_has_its_own_nodes(machine: FakeMachine) -> None:
    machine.pci("0000:01:00.0", "10de:2786", "0x030000", driver="nvidia")
    machine.write("proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: x\nDevice Minor: \t 0\n")
    machine.write("dev/nvidia0", "")
    machine.write("dev/nvidiactl", "")
    found = gpu(machine)
    assert found.nodes == ("/dev/nvidia0", "/dev/nvidiactl")
    assert found.state is DriverState.WORKING
    assert found.attributes["compute"] is True


def test_a_virtio_gpu_is_driven_from_one_level_below(machine: FakeMachine) -> None:
    folder = machine.pci("0000:00:05.0", "1af4:1050", "0x038000", driver="virtio-pci")
    below = machine.device(f"pci0000:00/{folder.name}/virtio3", "virtio", driver="virtio_gpu")
    machine.node(below, "drm", "card0", "dri/card0")
    machine.node(below, "drm", "renderD128", "dri/renderD128")
    found = gpu(machine)
    assert (found.driver, found.nodes) == ("virtio_gpu", ("/dev/dri/renderD128",))


def test_a_virtio_gpu_whose_own_driver_is_not_loaded(machine: FakeMachine) -> None:
    folder = machine.pci(
        "0000:00:05.0", "1af4:1050", "0x038000", driver="virtio-pci", modalias="pci:v00001AF4d00001050sv0sd0bc03sc80i00"
    )
    machine.device(f"pci0000:00/{folder.name}/virtio3", "virtio", modalias="virtio:d00000010v00001AF4")
    machine.aliases("virtio:d00000010v* virtio_gpu", "virtio:d00000001v* virtio_net")
    found = gpu(machine)
    assert (found.driver, found.state) == ("", DriverState.NO_DRIVER)
    assert "modprobe virtio_gpu" in found.hint


def test_a_mere_display_adapter_does_not_compute(machine: FakeMachine) -> None:
    folder = machine.pci("0000:00:01.0", "1234:1111", "0x030000", driver="bochs-drm")
    machine.node(folder, "drm", "card0", "dri/card0")
    found = gpu(machine)
    assert found.attributes["compute"] is False
    assert found.nodes == ("/dev/dri/card0",)


def test_virtual_functions_and_other_pci_devices_are_none(machine: FakeMachine) -> None:
    machine.pci("0000:00:1f.3", "8086:7e28", "0x040100", driver="snd_hda_intel")
    folder = machine.pci("0000:00:02.1", "8086:56a0", "0x030000")
    machine.link(f"sys/devices/pci0000:00/{folder.name}/physfn", "sys/devices/pci0000:00/0000:00:02.0")
    assert not [d for d in detect(machine.root) if d.kind in (DeviceKind.GPU, DeviceKind.NPU)]


def test_the_cores_of_an_rk3588s_npu_are_one_device(machine: FakeMachine) -> None:
    for address in ("fdab0000", "fdac0000", "fdad0000"):
        machine.device(f"platform/{address}.npu", "platform", driver="rocket", uevent="DRIVER=rocket")
        tree = f"sys/firmware/devicetree/base/npu@{address}"
        machine.write(f"{tree}/compatible", b"rockchip,rk3588-rknn-core\0")
        machine.link(f"sys/devices/platform/{address}.npu/of_node", tree)
    # rocket hangs its node on a device of its own.
    shared = machine.device("platform/rknn", "platform")
    machine.node(shared, "accel", "accel0", "accel/accel0")
    found = npu(machine)
    assert found.name == "Rockchip RK3588 NPU"
    assert found.attributes["cores"] == 3
    assert (found.driver, found.nodes, found.state) == ("rocket", ("/dev/accel/accel0",), DriverState.WORKING)


def test_an_rk3588s_npu_on_a_kernel_that_is_too_old(machine: FakeMachine) -> None:
    machine.device("platform/fdab0000.npu", "platform", uevent="OF_COMPATIBLE_0=rockchip,rk3588-rknpu")
    found = npu(machine)
    assert found.state is DriverState.NO_DRIVER
    assert "6.18" in found.hint


def test_a_mali_gpu_and_the_display_controller_beside_it(machine: FakeMachine) -> None:
    folder = machine.device(
        "platform/fb000000.gpu", "platform", driver="panthor", uevent="OF_COMPATIBLE_0=rockchip,rk3588-mali"
    )
    machine.node(folder, "drm", "card1", "dri/card1")
    machine.node(folder, "drm", "renderD128", "dri/renderD128")
    display = machine.device("platform/display-subsystem", "platform", driver="rockchip-drm")
    machine.node(display, "drm", "card0", "dri/card0")
    found = gpu(machine)
    assert (found.driver, found.bus, found.nodes) == ("panthor", "platform", ("/dev/dri/renderD128",))


def test_a_mali_gpu_without_its_firmware(machine: FakeMachine) -> None:
    machine.device("platform/fb000000.gpu", "platform", uevent="OF_COMPATIBLE_0=arm,mali-valhall-csf")
    machine.module("panthor")
    found = gpu(machine)
    assert found.state is DriverState.FIRMWARE_MISSING
    assert "firmware-misc-nonfree" in found.hint


@pytest.mark.parametrize("ids", ["1a6e:089a", "18d1:9302"])
def test_a_coral_on_usb_before_and_after_its_firmware(machine: FakeMachine, ids: str) -> None:
    vendor, product = ids.split(":")
    folder = machine.device(
        "pci0000:00/0000:00:14.0/usb2/2-1",
        "usb",
        idVendor=vendor,
        idProduct=product,
        busnum="2",
        devnum="7",
        speed="5000",
    )
    machine.write("dev/bus/usb/002/007", "")
    found = npu(machine)
    assert found.id == "npu_usb_2_1"
    assert found.state is DriverState.WORKING
    assert found.nodes == ("/dev/bus/usb/002/007",)
    assert found.attributes == {"library": "libedgetpu", "usb_mbit_s": 5000}
    # A program that uses it has claimed its interface.
    machine.device(f"pci0000:00/0000:00:14.0/usb2/{folder.name}/2-1:1.0", "usb", driver="usbfs")
    assert npu(machine).state is DriverState.HELD_BY_ANOTHER


def test_a_coral_whose_node_was_not_handed_over(machine: FakeMachine) -> None:
    machine.device("usb2/2-1", "usb", idVendor="18d1", idProduct="9302", busnum="2", devnum="7")
    assert npu(machine).state is DriverState.NO_PERMISSION


def test_ids_stay_when_other_devices_come(machine: FakeMachine) -> None:
    folder = machine.pci(*NPU, driver="intel_vpu")
    machine.node(folder, "accel", "accel0", "accel/accel0")
    before = npu(machine).id
    other = machine.pci("0000:00:04.0", "1da3:1020", "0x120000", driver="habanalabs")
    machine.node(other, "accel", "accel1", "accel/accel1")
    assert before in [device.id for device in detect(machine.root)]
