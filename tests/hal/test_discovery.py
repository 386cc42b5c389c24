"""Which backends are found, which files are believed, and what is said of the rest."""

from __future__ import annotations

import importlib.util
import os
import py_compile
from importlib import metadata
from pathlib import Path

import pytest

from ai_assistant.errors import AIAssistantError, BackendFailed, InvalidConfig, NotAuthorized, NotSupported
from ai_assistant.hal import backends as built_in
from ai_assistant.hal import discovery, dropin
from ai_assistant.hal.contract import Backend, Context, Probe
from ai_assistant.hal.remote import RemoteBackend

VENDOR = Path(__file__).parent / "remote" / "vendor.py"
ME = os.getuid()


class Mine(Backend):
    name = "mine"

    def probe(self) -> Probe:
        return Probe((), "not plugged in", "plug it in")

    def open(self, device: str = "") -> Context:
        raise NotSupported("not plugged in")


@pytest.fixture(autouse=True)
def only_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine that runs the tests may have backends of its own."""
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    monkeypatch.setattr(built_in, "BUILT_IN", ("mine",))
    monkeypatch.setattr(built_in, "load", lambda name: Mine())


def _write(folder: Path, name: str, text: str, mode: int = 0o644) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture
def code(tmp_path: Path) -> Path:
    return _write(tmp_path / "code", "backend.py", VENDOR.read_text())


def test_the_product_brings_its_own() -> None:
    found = discovery.discover(())
    assert list(found.backends) == ["mine"]
    assert found.sources == {"mine": "product"}
    assert isinstance(discovery.find("mine"), Mine)
    assert next(iter(discovery.backends())) == "mine"


def test_a_package_brings_one_and_a_broken_package_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    here = f"{__name__}:Mine" if "." in __name__ else "tests.hal.test_discovery:Mine"
    entries = [
        metadata.EntryPoint("theirs", here, discovery.GROUP),
        metadata.EntryPoint("gone", "no_such_module:X", discovery.GROUP),
        metadata.EntryPoint("wrong", "os:path", discovery.GROUP),
        metadata.EntryPoint("mine", here, discovery.GROUP),
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda group: entries if group == discovery.GROUP else [])
    found = discovery.discover(())
    assert set(found.backends) == {"mine", "theirs"}
    assert "no_such_module" in found.problems["gone"]
    assert "not name a class" in found.problems["wrong"]
    assert "taken" in found.problems["mine (package)"]
    with pytest.raises(BackendFailed, match="no_such_module"):
        discovery.find("gone")


def test_a_file_brings_one_in_a_process_of_its_own_unless_it_is_trusted(tmp_path: Path, code: Path) -> None:
    _write(tmp_path / "d", "far.toml", f'python = "{code}"\nloss = true\nmemory_bytes = 4000000000\n')
    _write(tmp_path / "d", "near.toml", f'python = "{code}"\ntrusted = true\n')
    found = discovery.discover([tmp_path / "d"], owner=ME)
    assert not found.problems
    far, near = found.backends["far"], found.backends["near"]
    assert isinstance(far, RemoteBackend)
    assert far.name == "far"
    assert not isinstance(near, RemoteBackend)
    assert near.probe().devices == far.probe().devices != ()
    assert found.sources["far"] == str(tmp_path / "d" / "far.toml")


def test_an_earlier_folder_replaces_and_an_empty_file_hides(tmp_path: Path, code: Path) -> None:
    for name in ("one", "two", "three"):
        _write(tmp_path / "usr", f"{name}.toml", f'python = "{code}"\n')
    _write(tmp_path / "etc", "one.toml", "")
    _write(tmp_path / "etc", "two.toml", f'python = "{code}"\ntrusted = true\n')
    (tmp_path / "etc" / "three.toml").symlink_to("/dev/null")
    found = discovery.discover([tmp_path / "etc", tmp_path / "usr", tmp_path / "absent"], owner=ME)
    assert set(found.backends) == {"mine", "two"}
    assert not isinstance(found.backends["two"], RemoteBackend)


@pytest.mark.parametrize(
    "text",
    [
        "x", "= 3", "\0", "python = 3", 'python = "backend.py"', 'python = "/a/../b.py"', 'python = "/no/such.py"',
        'library = "/etc/hostname"', 'python = "{code}"\nlibrary = "/x.so"', 'trusted = true', '[python]\na = 1',
        'python = "{code}"\ntrusted = 1', 'python = "{code}"\nloss = "yes"', 'python = "{code}"\nunknown = 1',
        'python = "{code}"\nmemory_bytes = -1', 'python = "{code}"\nmemory_bytes = nan',
        'python = "{code}"\nmemory_bytes = true', 'python = "\\u0000"', 'library = "{code}"', 'python = "/usr"',
        "a = " + "[" * 20000, "# " + "x" * 70000,
    ],
)  # fmt: skip
def test_files_that_say_nonsense(tmp_path: Path, code: Path, text: str) -> None:
    path = _write(tmp_path / "d", "bad.toml", text.replace("{code}", str(code)))
    with pytest.raises(InvalidConfig):
        dropin.read(path, owner=ME)
    found = discovery.discover([tmp_path / "d"], owner=ME)
    assert set(found.problems) == {"bad"}
    assert set(found.backends) == {"mine"}


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = _write(tmp_path / "d", "bad.toml", "")
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InvalidConfig):
        dropin.read(path, owner=ME)


@pytest.mark.parametrize("name", ["UPPER.toml", "a b.toml", ".hidden.toml", "x" * 50 + ".toml", "ä.toml", "-x.toml"])
def test_names_that_are_none(tmp_path: Path, code: Path, name: str) -> None:
    _write(tmp_path / "d", name, f'python = "{code}"\n')
    found = discovery.discover([tmp_path / "d"], owner=ME)
    assert set(found.backends) == {"mine"}


def test_what_others_can_write_is_not_believed(tmp_path: Path, code: Path) -> None:
    path = _write(tmp_path / "d", "x.toml", f'python = "{code}"\n')
    dropin.read(path, owner=ME)
    for place in (path, path.parent, code, code.parent):
        before = place.stat().st_mode
        for bit in (0o002, 0o020):
            place.chmod(before | bit)
            with pytest.raises(NotAuthorized, match="written by others"):
                dropin.read(path, owner=ME)
            assert "x" not in discovery.discover([tmp_path / "d"], owner=ME).backends
        place.chmod(before)
    dropin.read(path, owner=ME)


def test_a_folder_as_tmp_may_be_on_the_way_but_not_hold_the_code(tmp_path: Path, code: Path) -> None:
    """Others may put libraries, modules and bytecode beside it."""
    path = _write(tmp_path / "d", "x.toml", f'python = "{code}"\n')
    tmp_path.chmod(0o1777)
    dropin.read(path, owner=ME)
    for folder in (code.parent, path.parent):
        folder.chmod(0o1777)
        with pytest.raises(NotAuthorized, match="written by others"):
            dropin.read(path, owner=ME)
        folder.chmod(0o755)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    (tmp_path / "shared" / "link.py").symlink_to(code)
    with pytest.raises(NotAuthorized, match="shared"):
        dropin.read(_write(tmp_path / "d", "y.toml", f'python = "{tmp_path}/shared/link.py"\n'), owner=ME)


def test_bytecode_beside_a_file_is_not_run(tmp_path: Path) -> None:
    file = tmp_path / "backend.py"
    forged = Path(importlib.util.cache_from_source(str(file)))
    forged.parent.mkdir()
    file.write_text("raise RuntimeError('forged')\n")
    py_compile.compile(str(file), str(forged), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    file.write_text(VENDOR.read_text())
    path = _write(tmp_path / "d", "x.toml", f'python = "{file}"\ntrusted = true\n')
    assert discovery.discover([path.parent], owner=ME).backends["x"].probe()
    assert list(forged.parent.iterdir()) == [forged]


def test_a_link_to_what_others_can_write_is_not_believed(tmp_path: Path, code: Path) -> None:
    loose = _write(tmp_path / "loose", "code.py", code.read_text())
    (tmp_path / "loose").chmod(0o777)
    link = tmp_path / "code" / "link.py"
    link.symlink_to(loose)
    path = _write(tmp_path / "d", "x.toml", f'python = "{link}"\n')
    with pytest.raises(NotAuthorized, match="loose"):
        dropin.read(path, owner=ME)
    # Also when the file at the end is sound: whoever may change a link in between decides where it leads.
    between = tmp_path / "loose" / "between.py"
    between.symlink_to(code)
    link.unlink()
    link.symlink_to("../loose/between.py")
    with pytest.raises(NotAuthorized, match="loose"):
        dropin.read(path, owner=ME)


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    link = tmp_path / "loop.py"
    link.symlink_to(link)
    path = _write(tmp_path / "d", "x.toml", f'python = "{link}"\n')
    with pytest.raises(InvalidConfig):
        dropin.read(path, owner=ME)
    (tmp_path / "d" / "y.toml").symlink_to("y.toml")
    found = discovery.discover([tmp_path / "d"], owner=ME)
    assert set(found.problems) == {"x", "y"}


@pytest.mark.skipif(ME != 0, reason="only root can give files away")
def test_files_of_another_user_are_not_believed(tmp_path: Path, code: Path) -> None:
    path = _write(tmp_path / "d", "x.toml", f'python = "{code}"\n')
    dropin.read(path)
    os.chown(code, 65534, 65534)
    with pytest.raises(NotAuthorized):
        dropin.read(path)
    os.chown(code, 0, 0)
    os.chown(path, 65534, 65534)
    with pytest.raises(NotAuthorized):
        dropin.read(path)


def test_a_file_is_found_by_its_path(code: Path, tmp_path: Path) -> None:
    assert isinstance(discovery.find(str(code)), RemoteBackend)
    near = discovery.find(str(code), trusted=True)
    assert near.name == "vendor"
    assert near.probe()
    for name in ("absent", str(tmp_path / "absent.py"), "absent.so", str(tmp_path), "", "mine\0", "../mine"):
        with pytest.raises(AIAssistantError):
            discovery.find(name)
    other = tmp_path / "x.txt"
    other.write_text("")
    for trusted in (True, False):
        with pytest.raises(NotSupported, match="neither"):
            discovery.find(str(other), trusted=trusted)


@pytest.mark.parametrize(
    ("text", "error"),
    [("x = (", BackendFailed), ("raise SystemError('x')", BackendFailed), ("", InvalidConfig),
     ("BACKEND = object", InvalidConfig), ("BACKEND = 3", InvalidConfig)],
)  # fmt: skip
def test_python_files_that_are_none(tmp_path: Path, text: str, error: type[AIAssistantError]) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(error):
        discovery.find(str(path), trusted=True)


def test_a_process_of_its_own_loads_no_other_names() -> None:
    with pytest.raises(NotSupported):
        discovery.load_here("os")
