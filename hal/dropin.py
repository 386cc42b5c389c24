"""Files with which a vendor's package adds a backend, without any Python package:

    # /usr/lib/ai-assistant/backends.d/example.toml
    library = "/usr/lib/example/libexample_hal.so"   # or python = "/usr/lib/example/backend.py"
    trusted = false        # true: into the process that uses it; false (default): in a process of its own
    loss = true            # its process's death counts as the loss of the device (default false: as a defect)
    memory_bytes = 8000000000   # for its process, at most; default: as much as the machine has

Such a file decides what code runs, so it is believed only when it, the code, and every folder above them belong to root
and nobody else may write there. An empty file hides one of the same name in a later folder.
"""

from __future__ import annotations

import errno
import re
import stat
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ai_assistant.errors import InvalidConfig, NotAuthorized

MAX_BYTES = 64 << 10
MAX_FILES = 256
MAX_LINKS = 40
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")


@dataclass(frozen=True, slots=True)
class DropIn:
    """What such a file says. Its name is the backend's."""

    name: str
    file: Path
    trusted: bool = False
    loss: bool = False
    memory_bytes: int = 0


def files(folders: Sequence[Path], *, owner: int = 0) -> tuple[list[Path], dict[str, str]]:
    """The files that count, by name, and why others do not. A folder that is not there is none."""
    found: dict[str, Path] = {}
    problems = {}
    for folder in folders:
        try:
            here = sorted(folder.glob("*.toml"))[:MAX_FILES]
        except OSError as error:
            problems[str(folder)] = error.strerror or str(error)
            continue
        for path in here:
            found.setdefault(path.stem, path)
    for name, path in list(found.items()):
        try:
            if not _NAME.fullmatch(name):
                raise InvalidConfig("a backend's name has small letters, digits, - and _, and at most 40 of them")
            check_owner(path, owner=owner)
            if path.stat().st_size == 0 or not path.is_file():
                del found[name]  # hidden on purpose
        except (InvalidConfig, NotAuthorized) as error:
            problems[name[:60]] = error.message
            del found[name]
        except OSError as error:
            problems[name[:60]] = error.strerror or str(error)
            del found[name]
    return [found[name] for name in sorted(found)], problems


def read(path: Path, *, owner: int = 0) -> DropIn:
    """One file.

    Raises:
        InvalidConfig: it does not say what it should, or more.
        NotAuthorized: somebody else than root could have written it, or the code that it names.
    """
    check_owner(path, owner=owner)
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InvalidConfig(f"{path.name} is longer than {MAX_BYTES} bytes")
        table = tomllib.loads(data.decode())
    except OSError as error:
        raise InvalidConfig(f"{path.name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidConfig(f"{path.name} is no TOML: {str(error)[:100]}") from error
    if unknown := set(table) - {"library", "python", "trusted", "loss", "memory_bytes"}:
        raise InvalidConfig(f"{path.name} has {sorted(unknown)[0][:40]!r}, which means nothing")
    if ("library" in table) == ("python" in table):
        raise InvalidConfig(f"{path.name} names either a library or a Python file", hint='library = "/usr/lib/…so"')
    target, suffix = ("library", ".so") if "library" in table else ("python", ".py")
    named = table[target]
    # Without the dot-dot: what is checked must be what is loaded.
    if not isinstance(named, str) or not named.startswith("/") or "\0" in named or ".." in Path(named).parts:
        raise InvalidConfig(f"{target} in {path.name} is a whole path, as in /usr/lib/example{suffix}")
    for key in ("trusted", "loss"):
        if not isinstance(table.get(key, False), bool):
            raise InvalidConfig(f"{key} in {path.name} is true or false")
    memory = table.get("memory_bytes", 0)
    if isinstance(memory, bool) or not isinstance(memory, int) or not 0 <= memory < 1 << 62:
        raise InvalidConfig(f"memory_bytes in {path.name} is a number of bytes")
    try:
        file = Path(named).resolve(strict=True)
    except (OSError, RuntimeError):
        raise InvalidConfig(f"{named[:200]} of {path.name} is not there") from None
    if Path(named).suffix != suffix or not file.is_file():
        raise InvalidConfig(f"{named[:200]} of {path.name} is no file whose name ends with {suffix}")
    check_owner(Path(named), owner=owner)
    return DropIn(path.stem, Path(named), table.get("trusted", False), table.get("loss", False), memory)


def check_owner(path: Path, *, owner: int = 0) -> None:
    """Whether only root (or `owner`) could have written a file and put it there, links followed.

    Raises:
        NotAuthorized: which file or folder others can write to.
        OSError: it is not there.
    """
    # What lies beside a file is loaded with it: libraries, modules, bytecode. Nobody else may put something there.
    steps = list(_steps(path))
    beside = {path.absolute().parent.resolve(), steps[-1].parent}
    for each in steps:
        about = each.lstat()
        # Who may change a link is decided by its folder; in a folder such as /tmp, only its owner and root.
        others = 0 if stat.S_ISLNK(about.st_mode) else about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        sticky = stat.S_ISDIR(about.st_mode) and about.st_mode & stat.S_ISVTX and each not in beside
        if about.st_uid not in (0, owner) or (others and not sticky):
            raise NotAuthorized(
                f"{each} can be written by others than root, so {path.name} is not believed",
                hint=f"chown root: {each}; chmod go-w {each}",
            )


def _steps(path: Path) -> Iterator[Path]:
    """Every folder, link and file that is passed on the way to a file. Raises OSError: one is not there."""
    here, links = Path("/"), 0
    rest = list(reversed(path.absolute().parts[1:]))
    yield here
    while rest:
        part = rest.pop()
        if part == "..":
            here = here.parent
            continue
        step = here / part
        yield step
        if not step.is_symlink():
            here = step
            continue
        links += 1
        if links > MAX_LINKS:
            raise OSError(errno.ELOOP, "too many links", str(path))
        target = step.readlink()
        if target.is_absolute():
            here = Path("/")
        rest += reversed(target.parts[1:] if target.is_absolute() else target.parts)
