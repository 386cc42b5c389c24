"""Measured once, kept, and never believed for another machine."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import pytest

from ai_assistant.errors import InvalidConfig
from ai_assistant.hal.detect import __main__ as command
from ai_assistant.hal.detect import detect, measure
from ai_assistant.hal.device import DeviceKind, Source, Throughput
from tests.hal.detect.fake import FakeMachine

SMALL = 1 << 20


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    monkeypatch.setattr(measure, "product_tflop_s", lambda: 0.31)
    return FakeMachine(tmp_path / "root")


def throughput(machine: FakeMachine, kind: DeviceKind, state: Path | None) -> tuple[Throughput, ...]:
    (found,) = (device for device in detect(machine.root, state=state) if device.kind is kind)
    return found.throughput


def test_bandwidth_is_measured_once_and_kept(
    machine: FakeMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure.measure(detect(machine.root), tmp_path, copy_bytes=SMALL)
    (memory,) = throughput(machine, DeviceKind.MEMORY, tmp_path)
    assert memory.value > 0
    assert (memory.unit, memory.source) == ("GB/s", Source.MEASURED)
    (cpu,) = throughput(machine, DeviceKind.CPU, tmp_path)
    assert str(cpu) == "0.31 TFLOP/s fp32, measured"
    monkeypatch.setattr(measure, "bandwidth_gb_s", lambda *_: pytest.fail("measured again"))
    assert measure.measure(detect(machine.root), tmp_path) == first
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [measure.FILE]


def test_another_machine_is_measured_anew(machine: FakeMachine, tmp_path: Path) -> None:
    measure.measure(detect(machine.root), tmp_path, copy_bytes=SMALL)
    machine.write("proc/meminfo", "MemTotal: 32000000 kB\n")
    assert throughput(machine, DeviceKind.MEMORY, tmp_path) == ()
    measure.measure(detect(machine.root), tmp_path, copy_bytes=SMALL)
    assert len(throughput(machine, DeviceKind.MEMORY, tmp_path)) == 1


def test_nothing_is_said_without_a_measurement(machine: FakeMachine, tmp_path: Path) -> None:
    assert throughput(machine, DeviceKind.MEMORY, tmp_path) == ()
    assert throughput(machine, DeviceKind.MEMORY, None) == ()


def test_where_there_is_no_onnxruntime_the_bandwidth_is_kept(
    machine: FakeMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "product_tflop_s", lambda: 0.0)
    measure.measure(detect(machine.root), tmp_path, copy_bytes=SMALL)
    assert throughput(machine, DeviceKind.CPU, tmp_path) == ()
    assert len(throughput(machine, DeviceKind.MEMORY, tmp_path)) == 1


@pytest.mark.parametrize(
    "change",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"[" * 100_000,
        {"version": 2},
        {"memory": "fast"},
        {"memory": [1, None, {"value": "x"}]},
        {"memory": [{"value": -5, "unit": "GB/s", "source": "measured"}]},
        {"memory": [{"value": 1e999, "unit": "GB/s", "source": "measured"}]},
    ],
)
def test_a_spoiled_file_is_as_none(machine: FakeMachine, tmp_path: Path, change: bytes | dict[str, Any]) -> None:
    kept = measure.measure(detect(machine.root), tmp_path, copy_bytes=SMALL)
    content = change if isinstance(change, bytes) else json.dumps({**kept, **change}).encode()
    (tmp_path / measure.FILE).write_bytes(content)
    assert throughput(machine, DeviceKind.MEMORY, tmp_path) == ()


def test_a_folder_that_is_not_there_has_a_name(machine: FakeMachine, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig) as caught:
        measure.measure(detect(machine.root), tmp_path / "nowhere", copy_bytes=SMALL)
    assert caught.value.hint


def test_every_byte_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    monkeypatch.setattr(ctypes, "memmove", lambda target, source, size: copied.append(size))
    measure.bandwidth_gb_s(2, SMALL)
    assert sum(copied) == SMALL * measure.ROUNDS


def test_the_command_tells_people_and_programs(
    machine: FakeMachine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.pci("0000:00:0b.0", "8086:7d1d", "0x120000", driver="intel_vpu")
    firmware = tmp_path / "firmware"
    assert command.main(["--root", str(machine.root)]) == 0
    assert "hint: the driver intel_vpu does not find its firmware" in capsys.readouterr().out
    assert command.main(["--root", str(machine.root), "--json", "--firmware", str(firmware)]) == 0
    (npu,) = (one for one in json.loads(capsys.readouterr().out) if one["kind"] == "npu")
    assert npu["state"] == "firmware-missing"
    (firmware / "intel/vpu").mkdir(parents=True)
    (firmware / "intel/vpu/vpu_37xx_v1.bin").touch()
    assert command.main(["--root", str(machine.root), "--json", "--firmware", str(firmware)]) == 0
    (npu,) = (one for one in json.loads(capsys.readouterr().out) if one["kind"] == "npu")
    assert npu["state"] == "no-driver"
    with pytest.raises(SystemExit):
        command.main(["--measure"])
    assert command.main(["--measure", "--root", str(machine.root), "--state", str(tmp_path / "nowhere")]) == 1
    assert "hint" in capsys.readouterr().err


@pytest.mark.engine
def test_the_product_is_measured_by_the_engine() -> None:
    assert measure.product_tflop_s() > 0
