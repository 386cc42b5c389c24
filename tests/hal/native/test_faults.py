"""Libraries of other minor versions work; those that lie get a named error with a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ai_assistant.errors import (
    BackendFailed,
    DeviceLost,
    InvalidModel,
    NotSupported,
)
from ai_assistant.hal.contract import Context
from ai_assistant.hal.graph import DType, Graph, Node, TensorSpec, Value
from ai_assistant.hal.native import NativeBackend
from tests.hal.native import build

pytestmark = pytest.mark.engine
Load = Callable[[str], NativeBackend]
SPEC = TensorSpec(DType.F32, (4,))
X = np.array([-1, 2, -3, 4], np.float32)


def relu() -> Graph:
    return Graph((Value("x", SPEC), Value("y", SPEC)), (Node("Relu", 14, (0,), (1,)),), (0,), (1,))


def works(device: Context) -> None:
    program = device.compile(relu())
    made = device.allocator.tensor(SPEC)
    device.queue().submit(program, [device.allocator.upload(X)], [made]).wait(30)
    assert device.allocator.download(made).tolist() == [0, 2, 0, 4]


@pytest.mark.parametrize("fault", ["none", "newer", "older", "version_1_0", "power", "keeps"])
def test_other_minor_versions_and_optional_functions_work(faulty: Load, fault: str) -> None:
    with faulty(fault).open() as device:
        works(device)
        assert device.capabilities.host_memory == (fault != "older")


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        ("null_table", NotSupported, "does not speak version 1"),
        ("wild_table", BackendFailed, "a table that is none"),
        ("other_major", BackendFailed, "says that it speaks 2"),
        ("small_table", BackendFailed, "64 bytes"),
        ("empty_table", BackendFailed, "0 bytes"),
        ("huge_table", BackendFailed, "bytes"),
        ("null_open", BackendFailed, "no function open"),
        ("null_name", BackendFailed, "no name"),
        ("binary_name", BackendFailed, "no name"),
        ("long_name", BackendFailed, "no name"),
        ("null_version", BackendFailed, "no version"),
    ],
)
def test_a_table_that_lies_is_refused(faulty: Load, fault: str, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        faulty(fault)


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        ("no_devices", BackendFailed, "gave no list"),
        ("many_devices", BackendFailed, "4294967295 devices"),
        ("same_devices", BackendFailed, "the same one"),
        ("null_device", BackendFailed, "gave no device"),
        ("small_device", BackendFailed, "smaller than in version 1.0"),
        ("nameless_device", BackendFailed, "without an id"),
        ("zero_devices", NotSupported, "no device"),
        ("unavailable", NotSupported, "the firmware is missing"),
        ("null_error", BackendFailed, "did not say why"),
        ("odd_error", BackendFailed, "did not say why"),
        ("small_error", BackendFailed, "did not say why"),
        ("wild_error", BackendFailed, "did not say why"),
        ("binary_error", BackendFailed, "binary"),
        ("long_error", BackendFailed, "^x{500}$"),
        ("unknown_status", BackendFailed, "12345"),
        ("negative_status", BackendFailed, "-1"),
        ("no_context", BackendFailed, "gave nothing"),
        ("lost", DeviceLost, "went away"),
        ("alignment_3", BackendFailed, "alignment is 3"),
        ("alignment_0", BackendFailed, "alignment is 0"),
        ("no_dtypes", BackendFailed, "types of elements"),
        ("many_dtypes", BackendFailed, "types of elements"),
        ("strange_dtypes", BackendFailed, "no type of elements that is known"),
        ("negative_memory", BackendFailed, "bytes of memory"),
        ("says_power", BackendFailed, "no function power"),
    ],
)
def test_opening_what_lies_is_refused(faulty: Load, fault: str, kind: type[Exception], says: str) -> None:
    backend = faulty(fault)
    with pytest.raises(kind, match=says):
        backend.open()


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("negative_dims", "negative size"),
        ("other_dims", "the program says"),
        ("large_dims", "2.40 elements"),
        ("null_dims", "1 dimensions"),
        ("huge_rank", "4294967295 dimensions"),
        ("strange_dtype", "type 8"),
        ("wrong_count", "the program says 0"),
        ("huge_count", "4294967295 inputs or outputs"),
        ("null_specs", "does not say"),
    ],
)
def test_a_program_that_lies_is_refused(faulty: Load, fault: str, says: str) -> None:
    with faulty(fault).open() as device, pytest.raises(BackendFailed, match=says):
        device.compile(relu())


def test_unavailable_is_no_error(faulty: Load) -> None:
    probe = faulty("unavailable").probe()
    assert not probe
    assert (probe.unavailable, probe.hint) == ("the firmware is missing", "install firmware-acme")


def test_no_event_no_map_and_impossible_numbers(faulty: Load) -> None:
    with faulty("no_event").open() as device:
        program, x, y = device.compile(relu()), device.allocator.upload(X), device.allocator.tensor(SPEC)
        with pytest.raises(BackendFailed, match="no event"):
            device.queue().submit(program, [x], [y])
    with faulty("null_map").open() as device, pytest.raises(BackendFailed, match="gave nothing"):
        device.allocator.tensor(SPEC).numpy()
    with faulty("negative_statistics").open() as device, pytest.raises(BackendFailed, match="negative number"):
        device.allocator.statistics()


def test_reasons_are_read_within_bounds(faulty: Load) -> None:
    graph = relu()
    with faulty("long_reason").open() as device:
        assert device.supports(graph.nodes[0], graph).reason == "r" * 256
    with faulty("no_reason").open() as device:
        assert device.supports(graph.nodes[0], graph).reason == "example-c gave no reason"


def test_a_callback_that_is_called_twice_runs_once(faulty: Load) -> None:
    called: list[int] = []
    with faulty("calls_twice").open() as device:
        event = device.queue().callback(lambda: called.append(1))
        with pytest.raises(BackendFailed):
            event.wait(30)
    assert called == [1]


def test_power(faulty: Load, example: NativeBackend) -> None:
    with faulty("power").open() as device:
        assert device.power_w() == 12.5
    with faulty("power_nan").open() as device, pytest.raises(BackendFailed, match="nan W"):
        device.power_w()
    with example.open() as device:
        assert device.power_w() is None


def test_kept_programs_are_checked_before_the_library_sees_them(faulty: Load, example: NativeBackend) -> None:
    with faulty("keeps").open() as device:
        program = device.compile(relu())
        blob = program.blob()
        y = device.allocator.tensor(SPEC)
        device.queue().submit(device.load(blob), [device.allocator.upload(X)], [y]).wait(30)
        assert device.allocator.download(y).tolist() == [0, 2, 0, 4]
        for damaged in (b"", bytes(4096), blob[:-1], blob[: len(blob) // 2], blob + b"x", blob[:60] + b"?" + blob[61:]):
            with pytest.raises(InvalidModel):
                device.load(damaged)
        from ai_assistant.hal.native.programs import packed

        with pytest.raises(NotSupported, match="another backend"):
            device.load(packed(b'["example-c", "0.9", "0", 1]', b"payload"))
    with faulty("keeps_lying").open() as device, pytest.raises(BackendFailed, match="bytes"):
        device.compile(relu()).blob()
    with example.open() as device:
        with pytest.raises(NotSupported):
            device.compile(relu()).blob()
        with pytest.raises(NotSupported):
            device.load(blob)


def test_sizes_that_are_known_only_at_run_time(faulty: Load) -> None:
    with faulty("dynamic").open() as device:
        program = device.compile(relu())
        assert program.inputs[0].shape == (None,)
        assert program.output_specs([SPEC]) == (SPEC,)
        y = device.allocator.tensor(SPEC)
        device.queue().submit(program, [device.allocator.upload(X)], [y]).wait(30)
        assert device.allocator.download(y).tolist() == [0, 2, 0, 4]
    with faulty("dynamic_lying").open() as device, pytest.raises(BackendFailed, match="impossible sizes"):
        device.compile(relu()).output_specs([SPEC])


def test_files_that_are_no_backend(tmp_path: Path) -> None:
    text = tmp_path / "text.so"
    text.write_text("no library")
    with pytest.raises(NotSupported, match="cannot be loaded"):
        NativeBackend(text)
    with pytest.raises(NotSupported, match="cannot be loaded"):
        NativeBackend(tmp_path / "missing.so")
    source = tmp_path / "other.c"
    source.write_text("int other(void) { return 1; }\n")
    with pytest.raises(NotSupported, match="ai_hal_get_api"):
        NativeBackend(build.library(tmp_path, "other", [source], "-Wno-missing-prototypes"))


@pytest.mark.parametrize("fault", ["fd_negative", "fd_closed", "fd_standard", "fd_none"])
def test_a_descriptor_that_is_none_is_refused(faulty: Load, fault: str) -> None:
    with faulty(fault).open() as device:
        event = device.queue().record()
        with pytest.raises(BackendFailed, match="as a descriptor"):
            event.fileno()
        event.wait(30)


@pytest.mark.parametrize("fault", ["older", "version_1_0"])
def test_a_library_from_before_descriptors_has_none(faulty: Load, fault: str) -> None:
    with faulty(fault).open() as device:
        event = device.queue().record()
        with pytest.raises(NotSupported, match="no event_fd"):
            event.fileno()
        event.wait(30)
