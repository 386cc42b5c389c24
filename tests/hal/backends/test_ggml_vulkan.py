"""ggml's Vulkan plug-in: on lavapipe, without a GPU, and without Vulkan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ai_assistant.hal.backends import ggml
from ai_assistant.hal.ggml import vulkan

_DISABLE = "VK_LOADER_DRIVERS_DISABLE"
_PROGRAM = "tests.hal.backends.vulkan_program"
_LAVAPIPE = {
    "GGML_VK_VISIBLE_DEVICES": "0",
    "VK_LOADER_DRIVERS_SELECT": "*lvp*",  # also on a machine with a GPU
    "GALLIVM_PERF": "nopt",  # optimised, one shader takes up to a minute to compile
    "MESA_SHADER_CACHE_DISABLE": "1",
}


@pytest.fixture(autouse=True)
def _nobody_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*vulkan.CHOSEN, "GGML_VK_DISABLE_F16"):
        monkeypatch.delenv(name, raising=False)


def _node(root: Path, name: str, mode: int = 0o600) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()
    (root / name).chmod(mode)


def test_no_driver_is_loaded_without_a_gpu(tmp_path: Path) -> None:
    _node(tmp_path, "dev/dri/card0")  # a display alone
    assert not vulkan.reachable(tmp_path)
    with vulkan.drivers(tmp_path):
        assert os.environ[_DISABLE] == "*"
    assert _DISABLE not in os.environ


@pytest.mark.parametrize("name", ["dev/dri/renderD128", "dev/dri/renderD129", "dev/nvidiactl"])
def test_with_a_gpu_all_drivers_but_lavapipe_are(tmp_path: Path, name: str) -> None:
    _node(tmp_path, name)
    with vulkan.drivers(tmp_path):
        assert os.environ[_DISABLE] == "*lvp*"
    with pytest.raises(KeyError), vulkan.drivers(tmp_path):
        raise KeyError(name)
    assert _DISABLE not in os.environ


def test_a_gpu_that_may_not_be_opened_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _node(tmp_path, "dev/dri/renderD128")
    asked: list[tuple[Path, int]] = []

    def refuse(path: Path, mode: int) -> bool:
        asked.append((path, mode))
        return False

    monkeypatch.setattr(os, "access", refuse)
    assert not vulkan.reachable(tmp_path)
    assert asked == [(tmp_path / "dev/dri/renderD128", os.R_OK | os.W_OK)]


@pytest.mark.parametrize("name", vulkan.CHOSEN)
def test_what_somebody_has_chosen_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "*nvidia*")
    before = dict(os.environ)
    with vulkan.drivers(tmp_path):
        assert dict(os.environ) == before
    assert dict(os.environ) == before


def test_numbers_stay_whole_for_as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    with vulkan.exact():
        assert os.environ["GGML_VK_DISABLE_F16"] == "1"
    assert "GGML_VK_DISABLE_F16" not in os.environ
    monkeypatch.setenv("GGML_VK_DISABLE_F16", "yes")
    with vulkan.exact():
        pass
    assert os.environ["GGML_VK_DISABLE_F16"] == "yes"


class _Lib:
    """What the backend asks of the library about a device."""

    def __init__(self, address: str) -> None:
        self._address = address

    def name(self, _: int) -> str:
        return "Vulkan0"

    def runtime(self, _: int) -> str:
        return "Vulkan"

    def description(self, _: int) -> str:
        return "AMD Radeon 780M (RADV PHOENIX)"

    def address(self, _: int) -> str:
        return self._address


def test_a_gpu_is_named_with_its_driver_and_as_it_was_detected(tmp_path: Path) -> None:
    drivers = tmp_path / "sys/bus/pci/drivers/amdgpu"
    drivers.mkdir(parents=True)
    device = tmp_path / "sys/bus/pci/devices/0000:c1:00.0"
    device.mkdir(parents=True)
    (device / "driver").symlink_to(drivers)
    found = ggml._accelerator(_Lib("0000:c1:00.0"), 0, "gpu", tmp_path)  # type: ignore[arg-type]
    assert found.name == "ggml with Vulkan, AMD Radeon 780M (RADV PHOENIX), driver amdgpu"
    assert (found.id, found.kind, found.hal_id) == ("Vulkan0", "gpu", "gpu_pci_0000_c1_00_0")


@pytest.mark.parametrize("address", ["", "../../../etc", "0000:c1:00.0/..", "x" * 999, "0000:C1:00.0\n"])
def test_a_gpu_without_an_address_is_nobody_in_particular(tmp_path: Path, address: str) -> None:
    found = ggml._accelerator(_Lib(address), 0, "gpu", tmp_path)  # type: ignore[arg-type]
    assert (found.name, found.hal_id) == ("ggml with Vulkan, AMD Radeon 780M (RADV PHOENIX)", "")


def _ask(*arguments: str, before: Sequence[str] = (), variables: Mapping[str, str] = _LAVAPIPE) -> dict[str, Any]:
    done = subprocess.run(
        [*before, sys.executable, "-m", _PROGRAM, *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    said: dict[str, Any] = json.loads(done.stdout)
    return said


@pytest.mark.engine
def test_a_vulkan_device_computes_what_numpy_does() -> None:
    said = _ask("use")
    assert sorted(said["devices"]) == ["CPU", "Vulkan0"]
    name, kind, hal_id = said["devices"]["Vulkan0"]
    assert name.startswith("ggml with Vulkan, llvmpipe")
    assert (kind, hal_id) == ("gpu", "")
    for device in ("Vulkan0", "CPU"):
        used = said[device]
        product = np.array(used["x"]) @ np.array(used["weights"])
        powers = np.exp(product - product.max(-1, keepdims=True))
        wanted = powers / powers.sum(-1, keepdims=True)
        found = np.array(used["found"])
        # Products are ±20: with factors of f16, the default of these shaders, probabilities differ by a hundredth.
        assert np.allclose(found, wanted, rtol=1e-4, atol=1e-6), device
        assert used["again"] == used["found"]
        assert used["block"] < 1e-4
        assert used["memory"] > 2**28
        assert used["refused"]
        assert used["uploaded"] == 24 * 48 * 4


@pytest.mark.engine
def test_a_vulkan_device_is_bronze() -> None:
    command = [
        sys.executable,
        "-m",
        "ai_assistant",
        "hal",
        "certify",
        "ggml",
        "--device",
        "Vulkan0",
        "--level",
        "bronze",
    ]
    done = subprocess.run(
        [*command, "--json"], env={**os.environ, **_LAVAPIPE}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["level"] == "bronze"
    assert "Vulkan" in json.dumps(report)


@pytest.mark.engine
def test_lavapipe_is_no_gpu_of_the_product_and_nothing_is_loaded_for_it() -> None:
    said = _ask(variables={})
    if vulkan.reachable():
        assert not any("llvmpipe" in name for name, *_ in said["devices"].values())
        return
    assert said["plug_in"]
    assert list(said["devices"]) == ["CPU"]
    assert "libvulkan_" not in said["mapped"]
    assert "libLLVM" not in said["mapped"]
    # The drivers are there: whoever asks for them gets them.
    assert {"libvulkan.so", "libvulkan_", "libLLVM"} == set(_ask()["mapped"])


@pytest.mark.engine
def test_no_cpu_device_of_vulkan_is_taken_without_being_asked_for() -> None:
    """Also when the driver is loaded: it is ggml that leaves such devices out."""
    said = _ask(variables={"VK_LOADER_DRIVERS_SELECT": "*lvp*"})
    assert list(said["devices"]) == ["CPU"]
    assert "libvulkan_" in said["mapped"]


@pytest.mark.engine
def test_without_libvulkan_there_is_no_such_device_and_no_word_about_it() -> None:
    library = next(Path("/usr/lib/x86_64-linux-gnu").glob("libvulkan.so.1"))
    hide = f'mount --bind /dev/null {library} && exec "$@"'
    said = _ask(before=("unshare", "--mount", "sh", "-c", hide, "sh"))
    assert said["plug_in"]
    assert list(said["devices"]) == ["CPU"]
    assert said["mapped"] == []


@pytest.mark.engine
@pytest.mark.parametrize("devices", ["7", "0,0,9", "nonsense", "-1"])
def test_devices_that_are_not_there_cost_vulkan_and_nothing_else(devices: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", _PROGRAM],
        env={**os.environ, **_LAVAPIPE, "GGML_VK_VISIBLE_DEVICES": devices},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(json.loads(done.stdout)["devices"]) == ["CPU"]
