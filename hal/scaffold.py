"""`ai-assistant hal new`: a folder with a backend that works, to be changed step by step into the vendor's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from pathlib import Path

from ai_assistant.errors import AlreadyExists, InvalidArgument, NoSpace, NotAuthorized

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
MAX_NAME = 40


class Language(StrEnum):
    """What a backend is written in."""

    PYTHON = "python"
    C = "c"


@dataclass(frozen=True, slots=True)
class Scaffold:
    """What was made: the folder, its files, and what `certify` is to be given."""

    folder: Path
    files: tuple[Path, ...]
    backend: Path


def scaffold(name: str, parent: Path, language: Language = Language.PYTHON) -> Scaffold:
    """Make `parent/name` with a backend of that name.

    Args:
        name: lower-case words of letters and digits with hyphens between them, at most 40 characters.

    Raises:
        InvalidArgument: that is no name.
        AlreadyExists: the folder is there; nothing in it was touched.
        NotAuthorized, NoSpace: the folder cannot be written.
    """
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise InvalidArgument(
            f"{name[:60]!r} is no name of a backend",
            hint="lower-case letters and digits with single hyphens between, such as acme-npu",
            param="name",
        )
    texts = _python(name) if language is Language.PYTHON else _c(name)
    folder = parent / name
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise AlreadyExists(f"{folder} is there already", hint="choose another name or folder") from None
    except OSError as error:
        raise _named(error, folder) from error
    files = []
    for path, text in texts.items():
        file = folder / path
        try:
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise _named(error, file) from error
        files.append(file)
    built = files[0] if language is Language.PYTHON else folder / f"{_module(name)}.so"
    return Scaffold(folder, tuple(files), built)


def include_folder() -> Path:
    """Where `ai_hal.h` is, and the kit: `ai_hal_util.h`, `ai_hal_onnx.h`, `ai_hal_host.h`."""
    return Path(str(resources.files("ai_assistant.hal") / "include"))


def _named(error: OSError, path: Path) -> Exception:
    if isinstance(error, PermissionError):
        return NotAuthorized(f"{path} cannot be written", hint="choose a folder of your own with --folder")
    return NoSpace(f"{path} cannot be written: {error.strerror}")


def _module(name: str) -> str:
    return name.replace("-", "_")


def _class(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("-"))


def _example(*parts: str) -> str:
    return resources.files("ai_assistant.hal").joinpath("examples", *parts).read_text("utf-8")


def _python(name: str) -> dict[str, str]:
    module = _module(name)
    text = _example("vendor_python", "backend.py")
    text = text.replace("example-python", name).replace('HostQueue("example")', f'HostQueue("{name}")')
    text = re.sub(r"\bExample(?=Backend|Context|Program)", _class(name), text)
    text = text.replace("An example vendor backend in Python", f"The {name} backend")
    return {
        f"{module}.py": text,
        "pyproject.toml": _PYPROJECT.format(name=name, module=module, cls=_class(name)),
        "README.md": _README.format(
            name=name,
            file=f"{module}.py",
            target=f"{module}.py",
            build="",
            steps=_PYTHON_STEPS,
            install=f"`pip install .` makes it known by its name, `{name}`, through the entry point in pyproject.toml.",
        ),
    }


def _c(name: str) -> dict[str, str]:
    module = _module(name)
    text = _example("vendor-c", "example.c").replace("example-c", name)
    text = text.replace("An example vendor backend in C", f"The {name} backend", 1)
    return {
        f"{module}.c": text,
        "Makefile": _MAKEFILE.format(module=module),
        "README.md": _README.format(
            name=name,
            file=f"{module}.c",
            target=f"./{module}.so",
            build="make\n",
            steps=_C_STEPS,
            install=(
                f"Put `{module}.so` below /usr/lib and say so in `/etc/ai-assistant/backends.d/{name}.toml`, as\n"
                "docs/hal.md shows; it then runs in a process of its own."
            ),
        ),
    }


_PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "1.0"
description = "AI Assistant OS backend {name}"
requires-python = ">=3.11"
dependencies = ["ai-assistant", "numpy"]

[project.entry-points."ai_assistant.backends"]
{name} = "{module}:{cls}Backend"

[tool.setuptools]
py-modules = ["{module}"]
"""

_MAKEFILE = """\
INCLUDE ?= $(shell ai-assistant hal include)
CFLAGS += -std=gnu11 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -I$(INCLUDE)

{module}.so: {module}.c
	$(CC) $(CFLAGS) $(LDFLAGS) -shared -o $@ {module}.c -lm -lpthread

clean:
	rm -f {module}.so
.PHONY: clean
"""

_PYTHON_STEPS = """\
1. **Operators.** Each `register` says an operator's name, its types and the versions whose meaning you implement.
   What cannot be done is said in a `check`, with the reason: shapes that contradict the operator, too, since nobody
   looks for them before you (`same`, `broadcast`, `matmul` and `makes` do). Begin with one operator.
2. **Program.** `compile` gets a graph: plain data, see `ai_assistant.hal.graph`. Hand it to your compiler here.
3. **Context.** Memory and queues. Those of the host are given; replace them when your device has its own.
4. **Backend.** `probe` looks for your device, and says what is missing and what helps when it is not there."""

_C_STEPS = """\
1. **Device** (`probe`, `open_device`). Look for your device. When its driver or firmware is missing return
   AI_HAL_UNAVAILABLE with a hint that names the package: that is no failure.
2. **Memory** (`ai_hal_host_…` in the table). The host's, to begin with. Count bytes exactly.
3. **Operators** (`read_node`, `KERNELS`). Which nodes can be run, why others cannot, and the kernels. Keep the reasons.
   The kit reads thirteen operators; one of your own is read before them, by `ai_hal_read_like` or
   `ai_hal_read_operands`.
4. **Programs** (`compile`, `run`). A graph is plain structures, see `ai_hal.h`. Hand it to your compiler here.
5. **Queues** (`serve`, `queue_submit`). A thread each, to begin with; replace them by your driver's.

`ai-assistant hal include` says where `ai_hal.h` is, the contract, and the kit beside it: errors, checks and shapes
(`ai_hal_util.h`), ONNX's rules (`ai_hal_onnx.h`), memory and queues of the host (`ai_hal_host.h`)."""

_README = """\
# {name}

A backend for AI Assistant OS. It works as it stands, on the host's processor; `{file}` is where your device goes in.

```
{build}ai-assistant hal certify {target} --level bronze
```

{steps}

Certify after each step: `bronze` for memory, queues and threads, `silver` for operators, `gold` for whole networks.

{install}
"""
