"""The header compiles everywhere, its structures are the adapter's, and the example takes hosts that are wrong."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from ai_assistant.hal.native import NativeBackend, abi
from ai_assistant.hal.scaffold import Language, scaffold
from tests.hal.native import build

pytestmark = pytest.mark.engine

STRUCTURES = {
    "ai_hal_error": abi.Error,
    "ai_hal_host": abi.Host,
    "ai_hal_device": abi.Device,
    "ai_hal_devices": abi.Devices,
    "ai_hal_open_args": abi.OpenArgs,
    "ai_hal_capabilities": abi.Capabilities,
    "ai_hal_allocate_args": abi.AllocateArgs,
    "ai_hal_statistics": abi.Statistics,
    "ai_hal_spec": abi.Spec,
    "ai_hal_bytes": abi.Bytes,
    "ai_hal_value": abi.Value,
    "ai_hal_attribute": abi.Attribute,
    "ai_hal_node": abi.Node,
    "ai_hal_opset": abi.Opset,
    "ai_hal_graph": abi.Graph,
    "ai_hal_support": abi.Support,
    "ai_hal_compile_args": abi.CompileArgs,
    "ai_hal_program_info": abi.ProgramInfo,
    "ai_hal_tensor": abi.Tensor,
    "ai_hal_submit_args": abi.SubmitArgs,
    "ai_hal_api": abi.Api,
}


def run(folder: Path, source: str, *options: str) -> str:
    """What a C program prints."""
    file = folder / "program.c"
    file.write_text(source)
    build.gcc("-std=gnu11", *build.STRICT, *options, "-o", folder / "program", file)
    done = subprocess.run([folder / "program"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(("compiler", "language"), [("gcc", "-std=c11"), ("g++", "-std=c++17"), ("g++", "-std=c++20")])
def test_the_header_compiles_without_a_warning(tmp_path: Path, compiler: str, language: str) -> None:
    source = tmp_path / ("user.c" if compiler == "gcc" else "user.cpp")
    source.write_text(
        '#include "ai_hal.h"\n#include "ai_hal.h"\n'
        "int has(const ai_hal_open_args *args);\n"
        "int has(const ai_hal_open_args *args) { return AI_HAL_HAS(args, ai_hal_open_args, device); }\n"
    )
    build.gcc(language, *build.STRICT, "-Wconversion", "-c", "-o", tmp_path / "user.o", source, compiler=compiler)


def test_structures_lie_in_memory_as_the_adapter_thinks(tmp_path: Path) -> None:
    lines = ["#include <stdio.h>", '#include "ai_hal.h"', "int main(void) {"]
    wanted = []
    for name, structure in STRUCTURES.items():
        lines.append(f'    printf("{name} %zu\\n", sizeof({name}));')
        wanted.append(f"{name} {ctypes.sizeof(structure)}")
        for field, *_ in structure._fields_:
            lines.append(f'    printf("{name}.{field} %zu\\n", offsetof({name}, {field}));')
            wanted.append(f"{name}.{field} {getattr(structure, field).offset}")
    assert run(tmp_path, "\n".join([*lines, "    return 0;", "}", ""])).splitlines() == wanted


def test_every_structure_and_number_of_the_header_is_known_to_the_adapter(tmp_path: Path) -> None:
    header = (build.INCLUDE / "ai_hal.h").read_text()
    assert set(re.findall(r"^typedef struct (ai_hal_\w+) \{", header, re.M)) == {*STRUCTURES, "ai_hal_extension"}
    # Of each structure, every field is compared: the last one of ctypes ends where the C structure does.
    numbers = {f"AI_HAL_{each.name}": int(each) for each in (*abi.Status, *abi.Feature)}
    numbers |= {f"AI_HAL_ATTRIBUTE_{each.name}": int(each) for each in abi.AttributeType}
    numbers |= {f"AI_HAL_{dtype.upper()}": number for dtype, number in abi.DTYPES.items()}
    numbers |= {"AI_HAL_UNKNOWN": 0, "AI_HAL_MAX_RANK": abi.MAX_RANK, "AI_HAL_MAX_STRING": abi.MAX_STRING}
    numbers |= {"AI_HAL_REASON_SIZE": abi.REASON_SIZE, "AI_HAL_MAJOR": abi.MAJOR, "AI_HAL_MINOR": abi.MINOR}
    enumerators = set(re.findall(r"^    (AI_HAL_[A-Z0-9_]+) = ", header, re.M))
    assert enumerators <= set(numbers)
    prints = "".join(f'    printf("{name} %ld\\n", (long)({name}));\n' for name in numbers)
    made = run(tmp_path, f'#include <stdio.h>\n#include "ai_hal.h"\nint main(void) {{\n{prints}    return 0;\n}}\n')
    assert made.splitlines() == [f"{name} {number}" for name, number in numbers.items()]


@pytest.mark.parametrize(
    ("header", "compiler", "language"),
    [
        ("ai_hal_util.h", "gcc", "-std=c11"),
        ("ai_hal_util.h", "g++", "-std=c++17"),
        ("ai_hal_onnx.h", "gcc", "-std=c11"),
        ("ai_hal_onnx.h", "g++", "-std=c++17"),
        ("ai_hal_host.h", "gcc", "-std=c11"),
    ],
)
def test_the_kit_compiles_without_a_warning(tmp_path: Path, header: str, compiler: str, language: str) -> None:
    source = tmp_path / ("user.c" if compiler == "gcc" else "user.cpp")
    source.write_text(f'#include "{header}"\n#include "{header}"\nint user(void);\nint user(void) {{ return 0; }}\n')
    options = ("-D_GNU_SOURCE", "-Wconversion", "-c", "-o", tmp_path / "user.o", source)
    build.gcc(language, "-U_GNU_SOURCE", *build.STRICT, *options, compiler=compiler)


SANITIZED = [
    ("-O2",),
    ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    ("-O1", "-g", "-fsanitize=thread"),
]


def _works(folder: Path, sources: list[Path], options: tuple[str, ...]) -> None:
    program = folder / "program"
    build.gcc("-std=gnu11", *build.STRICT, *options, "-o", program, *sources, "-lm", "-lpthread")
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "all is well"


@pytest.mark.parametrize("options", SANITIZED)
def test_the_example_against_a_host_in_c(tmp_path: Path, options: tuple[str, ...]) -> None:
    _works(tmp_path, [Path(__file__).with_name("host.c"), build.EXAMPLE / "example.c"], options)


@pytest.mark.parametrize("options", SANITIZED)
def test_the_kit_by_itself(tmp_path: Path, options: tuple[str, ...]) -> None:
    _works(tmp_path, [Path(__file__).with_name("kit.c")], options)


def test_the_example_is_short_enough_to_be_read() -> None:
    lines = [line for path in build.EXAMPLE.glob("*.[ch]") for line in path.read_text().splitlines()]
    assert len(lines) <= 400
    assert max(map(len, lines)) <= 110


def test_the_example_builds_as_its_guide_says(tmp_path: Path) -> None:
    command = re.search(r"`(gcc [^`]+)`", (build.EXAMPLE / "README.md").read_text())
    assert command
    words = command[1].replace("-o example.so", f"-o {tmp_path}/example.so").split()
    subprocess.run([*words, "-Wall", "-Wextra", "-Werror"], check=True, cwd=build.EXAMPLE)
    exported = subprocess.run(
        ["nm", "-D", "--defined-only", tmp_path / "example.so"], check=True, capture_output=True, text=True
    ).stdout
    assert [line.split()[-1] for line in exported.splitlines()] == ["ai_hal_get_api"]


def test_what_hal_new_makes_of_it_builds_and_works_under_its_own_name(tmp_path: Path) -> None:
    made = scaffold("acme-npu", tmp_path, Language.C)
    sources = [path for path in made.files if path.suffix == ".c"]
    build.library(made.folder, made.backend.stem, sources)
    backend = NativeBackend(made.backend)
    assert backend.name == "acme-npu"
    with backend.open() as device:
        device.allocator.allocate(16).free()
        device.queue().synchronize(30)
