"""Which backends there are: those of the product, those that a package brings, and those that a vendor dropped in.

1. `hal.backends.BUILT_IN`.
2. Entry points of the group `ai_assistant.backends`: the class, in an installed Python package.
3. Files `NAME.toml` in /etc/ai-assistant/backends.d and /usr/lib/ai-assistant/backends.d, see `dropin`.

The first of a name wins; what is broken is told in `problems` and hides nothing else.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType

from ai_assistant.errors import AIAssistantError, BackendFailed, InvalidConfig, NotSupported
from ai_assistant.hal import backends as built_in
from ai_assistant.hal import dropin
from ai_assistant.hal.contract import Backend

GROUP = "ai_assistant.backends"
FOLDERS = (Path("/etc/ai-assistant/backends.d"), Path("/usr/lib/ai-assistant/backends.d"))


@dataclass(frozen=True, slots=True)
class Discovery:
    """Backends by name, where each comes from, and what could not be used, with the reason."""

    backends: dict[str, Backend] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def backends() -> dict[str, Backend]:
    """Every backend that can be used, by name. Whether it has a device here its `probe` tells."""
    return discover().backends


def discover(folders: Sequence[Path] = FOLDERS, *, owner: int = 0) -> Discovery:
    """Look everywhere.

    Args:
        folders: with drop-in files; a file of the same name in an earlier folder replaces one in a later.
        owner: the user besides root whose files are believed.
    """
    found = Discovery()
    for name in built_in.BUILT_IN:
        _add(found, name, "product", partial(built_in.load, name))
    for entry in metadata.entry_points(group=GROUP):
        _add(found, entry.name, "package", partial(_of_package, entry))
    files, problems = dropin.files(folders, owner=owner)
    found.problems.update(problems)
    for path in files:
        _add(found, path.stem, str(path), partial(_of_dropin, path, owner))
    return found


def find(name_or_path: str, *, trusted: bool = False) -> Backend:
    """A backend by its name, or a file that is one: a shared library (`*.so`) or a Python file.

    Args:
        trusted: load a file into this process. Without it, it runs in a process of its own.

    Raises:
        NotSupported: there is none of that name, or the file is neither.
        BackendFailed: it cannot be loaded.
    """
    if "/" in name_or_path or name_or_path.endswith((".so", ".py")):
        path = Path(name_or_path).expanduser().absolute()
        if not path.is_file():
            raise NotSupported(f"there is no file {name_or_path[:200]!r}")
        return _load_file(path) if trusted else _remote(path)
    found = discover()
    if name_or_path in found.backends:
        return found.backends[name_or_path]
    if name_or_path in found.problems:
        raise BackendFailed(f"the backend {name_or_path} cannot be used: {found.problems[name_or_path]}")
    raise NotSupported(
        f"there is no backend {name_or_path[:60]!r}",
        hint=f"there are {', '.join(sorted(found.backends))}; a file is given with its path",
    )


def load_here(spec: str) -> Backend:
    """What a backend's own process loads: a file, or a backend of the product. Raises as `find`."""
    if "/" in spec:
        return _load_file(Path(spec))
    if spec not in built_in.BUILT_IN:
        raise NotSupported(f"there is no backend {spec[:60]!r} in the product")
    return built_in.load(spec)


def _add(found: Discovery, name: str, source: str, make: Callable[[], Backend]) -> None:
    if name in found.backends:
        found.problems[f"{name} ({source})"] = f"the name is taken by the one of {found.sources[name]}"
        return
    try:
        backend = make()
    except AIAssistantError as error:
        found.problems[name] = error.message
    except Exception as error:
        found.problems[name] = f"{type(error).__name__}: {str(error)[:200]}"
    else:
        found.backends[name] = backend
        found.sources[name] = source


def _of_package(entry: metadata.EntryPoint) -> Backend:
    return _instance(entry.load(), entry.value)


def _of_dropin(path: Path, owner: int) -> Backend:
    found = dropin.read(path, owner=owner)
    if found.trusted:
        return _load_file(found.file)
    return _remote(found.file, name=found.name, loss=found.loss, memory_bytes=found.memory_bytes)


def _remote(path: Path, *, name: str = "", loss: bool = False, memory_bytes: int = 0) -> Backend:
    from ai_assistant.hal.remote import Limits, RemoteBackend

    if path.suffix not in (".so", ".py"):
        raise NotSupported(f"{path.name} is neither a shared library (.so) nor a Python file (.py)")
    return RemoteBackend(str(path), name=name, limits=Limits(memory_bytes=memory_bytes), loss=loss)


class _FromSource(SourceFileLoader):
    """Runs what the file says. Bytecode beside it may be somebody else's than the file that was checked."""

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code


def _load_file(path: Path) -> Backend:
    if path.suffix == ".so":
        from ai_assistant.hal.native import NativeBackend

        return NativeBackend(path)
    if path.suffix != ".py":
        raise NotSupported(f"{path.name} is neither a shared library (.so) nor a Python file (.py)")
    name = f"_ai_assistant_backend_{path.stem}"
    loader = _FromSource(name, str(path))
    # A location gives the module its __file__.
    description = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert description is not None  # None is for want of a loader
    module = importlib.util.module_from_spec(description)
    try:
        loader.exec_module(module)
    except AIAssistantError:
        raise
    except Exception as error:
        raise BackendFailed(f"{path.name} cannot be loaded: {type(error).__name__}: {str(error)[:200]}") from error
    return _instance(getattr(module, "BACKEND", None), path.name)


def _instance(kind: object, where: str) -> Backend:
    if not (isinstance(kind, type) and issubclass(kind, Backend)):
        raise InvalidConfig(f"{where} does not name a class that is a Backend", hint="BACKEND = YourBackend")
    return kind()
