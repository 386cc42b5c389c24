"""Detection of six mini-PCs that umockdev shows it, each as it works and each with a driver that does not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hal.machines import reconstruct

FILES = reconstruct.files()
CASES = [(file, variant) for file in FILES for variant in reconstruct.machines(file)]
ROOT = Path(__file__).resolve().parents[2]

REQUIRED = {
    "an AMD Ryzen AI": ("npu", "1022:17f0"),
    "an Intel Core Ultra": ("npu", "8086:7d1d"),
    "an Intel N100": ("gpu", "8086:46d1"),
    "an RK3588": ("npu", "fdab0000.npu"),
    "a discrete GPU": ("gpu", "1002:694e"),
    "a USB accelerator": ("npu", "18d1:9302"),
}
# A list of packages says nothing about hardware, and a mirror is nobody's publication.
NO_SOURCE = ("pypi", "npmjs", "crates.io", "debian.org", "docker", "mirror", "huggingface", "/work/", "/home/")


def detect(file: Path, variant: str, folder: Path) -> list[dict[str, Any]]:
    text = folder / "machine.umockdev"
    text.write_text(reconstruct.machines(file)[variant].umockdev(), "utf-8")
    command = [sys.executable, "-m", "tests.hal.machines.inside", str(file), variant]
    result = subprocess.run(
        ["umockdev-run", "--device", str(text), "--", *command],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


@pytest.mark.bus
@pytest.mark.parametrize(("file", "variant"), CASES, ids=[f"{file.stem}-{variant}" for file, variant in CASES])
def test_detection(file: Path, variant: str, tmp_path: Path) -> None:
    expected = reconstruct.machines(file)[variant].expect
    found = {(one["kind"], one["address"]): one for one in detect(file, variant, tmp_path)}
    ours = {key for key in found if key[0] in ("cpu", "gpu", "npu")}
    assert ours == {key for key in expected if key[0] != "memory"}
    for key, want in expected.items():
        got = found[key]
        assert {name: got[name] for name in ("name", "vendor", "driver", "state", "nodes") if name in want} == {
            name: want[name] for name in ("name", "vendor", "driver", "state", "nodes") if name in want
        }
        if "id" in want:
            assert f"{got['vendor_id']}:{got['product_id']}" == want["id"]
        attributes = want.get("attributes", {})
        assert {name: got["attributes"].get(name) for name in attributes} == attributes
        assert bool(got["hint"]) == (want["state"] != "working")
        assert [word for word in want.get("hint", []) if word not in got["hint"]] == [], got["hint"]


def test_there_is_each_kind_of_machine_and_each_has_a_broken_variant() -> None:
    assert len(FILES) >= 6
    assert len({reconstruct.read(file)["name"] for file in FILES}) == len(FILES)
    for what, (kind, mark) in REQUIRED.items():
        fitting = [
            machines
            for machines in map(reconstruct.machines, FILES)
            if any(key[0] == kind and mark in (key[1], one.get("id")) for key, one in machines["works"].expect.items())
        ]
        assert fitting, what
        assert all(len(machines) >= 2 for machines in fitting), what
    for file in FILES:
        for name, machine in reconstruct.machines(file).items():
            states = {one["state"] for one in machine.expect.values()}
            assert (states == {"working"}) == (name == "works"), f"{file.name}: {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_block_says_where_its_facts_can_be_read(file: Path) -> None:
    data = reconstruct.read(file)
    assert data["form"] == "reconstruction"
    blocks = reconstruct.sources(data)
    assert {place.partition("[")[0] for place, _ in blocks} >= {"os", "cpu", "device", "broken"}
    for place, given in blocks:
        assert given, f"{file.name}: {place} has no source"
        for one in given:
            assert re.match(r"https://[\w.-]+\.\w+(/|$| )", one), f"{file.name}: {place}: {one}"
            assert not any(word in one.lower() for word in NO_SOURCE), f"{file.name}: {place}: {one}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_two_devices_share_a_path_or_a_node(file: Path) -> None:
    for machine in reconstruct.machines(file).values():
        paths = [device.path for device in machine.devices]
        nodes = [node.name for node in machine.nodes]
        assert len(set(paths)) == len(paths)
        assert len(set(nodes)) == len(nodes)
