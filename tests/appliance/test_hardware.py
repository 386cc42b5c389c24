"""Hardware in the booted image: what is found, and a vendor's first backend, begun and certified where it will run."""

from __future__ import annotations

import json
import time

import pytest

from image.container import Container

pytestmark = pytest.mark.appliance


def test_the_processor_is_found_and_said_to_everybody(appliance: Container) -> None:
    deadline = time.monotonic() + 60
    while not (found := json.loads(appliance.run("ai-assistant", "devices", "--json", user="nobody").stdout)):
        assert time.monotonic() < deadline, "no device appeared"
        time.sleep(0.5)
    kinds = {each["kind"] for each in found}
    assert {"cpu", "memory"} <= kinds
    processor = next(each for each in found if each["kind"] == "cpu")
    assert processor["state"] == "working"
    assert processor["attributes"]["threads"] >= 1
    log = appliance.run("journalctl", "-u", "ai-assistantd", "--no-pager").stdout
    assert "devices are not followed any more" not in log
    assert "devices that come and go cannot be followed" not in log


def test_the_products_backends_are_there(appliance: Container) -> None:
    rows = json.loads(appliance.run("ai-assistant", "hal", "list", "--json").stdout)
    found = {each["backend"]: each for each in rows}
    for name in ("cpu", "onnxruntime", "ggml", "null"):
        assert found[name]["devices"], found[name]
    assert found["openvino"]["unavailable"]


def test_gpus_have_vulkans_drivers_and_the_processor_is_none_of_them(appliance: Container) -> None:
    drivers = appliance.run("ls", "/usr/share/vulkan/icd.d").stdout.split()
    assert any("radeon" in each for each in drivers)
    assert any("intel" in each for each in drivers)
    assert not any("lvp" in each for each in drivers)
    appliance.run("sh", "-c", "test -e /usr/lib/x86_64-linux-gnu/libvulkan.so.1")
    appliance.run("sh", "-c", "! ls /usr/lib/x86_64-linux-gnu/libvulkan_lvp.so")
    # A container has no GPU: nothing of all this is loaded, and nothing is said.
    done = appliance.run("ai-assistant", "hal", "list", "--json")
    ggml = next(each for each in json.loads(done.stdout) if each["backend"] == "ggml")
    assert [each["kind"] for each in ggml["devices"]] == ["cpu"]
    assert "vulkan" not in done.stderr.lower()


def test_a_worker_with_a_gpu_has_render_nodes_and_no_card(appliance: Container) -> None:
    """Nodes of null and zero with the names and owners of a GPU's, and a worker that only says what it can open."""
    units = "/run/systemd/system/ai-assistant-{}worker@.service.d"
    look = (
        "import os, sys\n"
        "for name in ('renderD128', 'card0', 'renderD140'):\n"
        "    try:\n"
        "        os.close(os.open('/dev/dri/' + name, os.O_RDWR))\n"
        "        print(name, 'opened')\n"
        "    except OSError as error:\n"
        "        print(name, type(error).__name__)\n"
        "print(os.path.exists('/dev/kmsg'))\n"
    )
    appliance.run("sh", "-c", "cat >/run/look.py", stdin=look)
    begin = "set -e; mkdir -p /dev/dri; cd /dev/dri; "
    for name, minor, group in (("renderD128", 3, "render"), ("card0", 5, "video")):
        begin += f"mknod {name} c 1 {minor}; chgrp {group} {name}; chmod 660 {name}; "
    try:
        appliance.run("sh", "-c", begin)
        for kind in ("", "gpu-"):
            drop_in = "[Service]\nType=oneshot\nExecStart=\nExecStart=/usr/bin/python3 /run/look.py\n"
            folder = units.format(kind)
            appliance.run("sh", "-c", f"mkdir -p {folder}; cat >{folder}/99-look.conf", stdin=drop_in)
        appliance.run("systemctl", "daemon-reload")
        said = {}
        for kind in ("", "gpu-"):
            unit = f"ai-assistant-{kind}worker@look.service"
            appliance.run("systemctl", "start", unit)
            appliance.run("journalctl", "--sync")
            log = appliance.run("journalctl", "--no-pager", "-o", "cat", "-u", unit, "_COMM=python3").stdout
            said[kind] = log.splitlines()[-4:]
        missing = "FileNotFoundError"
        assert said[""] == [f"renderD128 {missing}", f"card0 {missing}", f"renderD140 {missing}", "False"]
        assert said["gpu-"] == ["renderD128 opened", "card0 PermissionError", f"renderD140 {missing}", "False"]
    finally:
        appliance.run("sh", "-c", f"rm -rf /dev/dri /run/look.py {units.format('')} {units.format('gpu-')}")
        appliance.run("systemctl", "daemon-reload")


def test_a_backend_is_begun_and_certified_in_the_image(appliance: Container) -> None:
    begin = "cd /tmp && rm -rf acme-npu acme-chip && "
    python = "ai-assistant hal new acme-npu && ai-assistant hal certify acme-npu/acme_npu.py --level bronze --json"
    done = appliance.run("sh", "-c", begin + python, timeout_s=300)
    assert '"level": "bronze"' in done.stdout or '"level":"bronze"' in done.stdout
    native = (
        "ai-assistant hal new acme-chip --language c && make -C acme-chip && "
        "ai-assistant hal certify acme-chip/acme_chip.so --level bronze"
    )
    done = appliance.run("sh", "-c", "cd /tmp && " + native, timeout_s=300)
    assert "bronze" in done.stdout
