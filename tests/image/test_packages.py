"""The package lock: what it may say, what apt gets of it, and what differs from it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from image.packaging import apt, drift, folder, lock, renew
from image.packaging.errors import BadLock, MirrorIncomplete, PackagingError
from image.packaging.lock import LOCK, Lock, Package, parse, read, write
from tests.image.debs import archive, deb, package

GOOD = f"bash 5.2-1 amd64 {'a' * 64} 1000 pool/main/b/bash/bash_5.2-1_amd64.deb"


def test_a_lock_is_read_and_written_alike(tmp_path: Path) -> None:
    content = deb("zlib1g", "1:1.3+really1~b2-1")
    made = write([package("zlib1g", "1:1.3+really1~b2-1", content), parse(GOOD).packages["bash"]], tmp_path / "lock")
    assert read(tmp_path / "lock") == made
    assert [line.split()[0] for line in made.text.splitlines()[2:]] == ["bash", "zlib1g"]
    assert list(tmp_path.iterdir()) == [tmp_path / "lock"]


@pytest.mark.skipif(not LOCK.exists(), reason="nothing is locked yet")
def test_the_committed_lock_is_good_and_sorted() -> None:
    committed = read()
    assert committed.text == LOCK.read_text()
    assert {"linux-image-amd64", "systemd", "mkosi", "gcc-14"} <= committed.packages.keys()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("bash 5.2-1 amd64", "3 fields"),
        (GOOD + " more", "7 fields"),
        (GOOD.replace("bash ", "Bash "), "bad name"),
        (GOOD.replace("5.2-1 ", "five "), "bad version"),
        (GOOD.replace("amd64 ", "i386 "), "bad architecture"),
        (GOOD.replace("a" * 64, "a" * 63), "bad sha256"),
        (GOOD.replace("a" * 64, "A" * 64), "bad sha256"),
        (GOOD.replace(" 1000 ", " 0 "), "bad size"),
        (GOOD.replace(" 1000 ", " -5 "), "bad size"),
        (GOOD.replace("pool/main", "pool/../.."), "bad pool path"),
        (GOOD.replace("pool/", "/pool/"), "bad pool path"),
        (GOOD.replace("pool/", "http://mirror.example/pool/"), "bad pool path"),
        (GOOD.replace("_amd64.deb", "_amd64.exe"), "bad pool path"),
        (f"{GOOD}\n{GOOD}", "twice"),
        ("", "no package"),
        ("\0\0\0\0", "1 fields"),
    ],
)
def test_a_bad_line_is_named(line: str, complaint: str) -> None:
    with pytest.raises(BadLock, match=complaint):
        parse(line)


def test_a_bad_lock_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadLock, match="cannot read"):
        read(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(BadLock, match="not plain text"):
        read(tmp_path / "binary")


def test_pins_hold_each_package_at_its_version() -> None:
    assert apt.pins(parse(GOOD)) == "Package: bash\nPin: version 5.2-1\nPin-Priority: 1001\n\n"


def test_apt_is_told_of_one_source_only_when_locked(tmp_path: Path) -> None:
    held = parse(GOOD)
    stale = tmp_path / "etc/apt/sources.list.d/other.sources"
    stale.parent.mkdir(parents=True)
    stale.write_text("Types: deb\n")
    apt.configure(tmp_path, apt.locked_sources(Path("/some/folder"), held), apt.pins(held))
    sources = list((tmp_path / "etc/apt/sources.list.d").iterdir())
    assert [path.name for path in sources] == ["mkosi.sources"]
    assert f"URIs: file:///some/folder\nSuites: {held.suite}\n" in sources[0].read_text()
    assert "Pin: version 5.2-1" in (tmp_path / "etc/apt/preferences.d/locked.pref").read_text()


def manifest(path: Path, *packages: tuple[str, str]) -> Path:
    entries = [{"type": "deb", "name": name, "version": v, "architecture": "amd64"} for name, v in packages]
    path.write_text(json.dumps({"manifest_version": 1, "packages": entries}))
    return path


def test_drift_names_every_difference(tmp_path: Path) -> None:
    found = drift.from_manifest(manifest(tmp_path / "m", ("bash", "5.3-1"), ("dash", "1.0"), ("awk", "2")))
    assert list(drift.differences(found, parse(GOOD))) == [
        "awk 2 is not in the lock",
        "bash is 5.3-1, locked is 5.2-1",
        "dash 1.0 is not in the lock",
    ]
    assert list(drift.differences(drift.from_manifest(manifest(tmp_path / "m", ("bash", "5.2-1"))), parse(GOOD))) == []


def test_drift_of_a_tree_counts_what_is_installed(tmp_path: Path) -> None:
    status = tmp_path / "var/lib/dpkg/status"
    status.parent.mkdir(parents=True)
    status.write_text(
        "Package: bash\nStatus: install ok installed\nArchitecture: amd64\nVersion: 5.2-1\nDescription: a shell\n"
        " Version: 9\n\nPackage: gone\nStatus: deinstall ok config-files\nArchitecture: all\nVersion: 1\n"
    )
    assert drift.from_tree(tmp_path) == {drift.Installed("bash", "5.2-1", "amd64")}


@pytest.mark.parametrize("content", ["", "[]", '{"packages": 3}', '{"packages": [{"type": "deb"}]}', "\0"])
def test_a_broken_manifest_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.manifest").write_text(content)
    with pytest.raises(PackagingError, match=r"x\.manifest is no manifest"):
        drift.from_manifest(tmp_path / "x.manifest")
    with pytest.raises(PackagingError, match="cannot read"):
        drift.from_manifest(tmp_path / "none")


def test_builds_that_differ_cannot_be_locked_together() -> None:
    old, new = drift.Installed("bash", "5.2-1", "amd64"), drift.Installed("bash", "5.3-1", "amd64")
    assert renew.together({"x": [old], "y": [old]}) == {old}
    with pytest.raises(PackagingError, match=r"bash is 5\.2-1 in x, 5\.3-1 in y"):
        renew.together({"x": [old], "y": [new]})


def test_hashes_come_from_the_index_or_from_the_lock_before() -> None:
    index = (
        f"Package: bash\nVersion: 5.3-1\nArchitecture: amd64\nFilename: pool/updates/b_5.3-1_amd64.deb\n"
        f"Size: 7\nSHA256: {'b' * 64}\nDescription: shell\n SHA256: no\n\n"
        f"Package: bash\nVersion: 5.3-1\nArchitecture: amd64\nFilename: pool/main/b_5.3-1_amd64.deb\nSize: 7\n"
        f"SHA256: {'b' * 64}\n\nPackage: half\nVersion: 1\n"
    )
    known = renew.read_index(index)
    new, old = drift.Installed("bash", "5.3-1", "amd64"), drift.Installed("bash", "5.2-1", "amd64")
    assert known == {new: Package("bash", "5.3-1", "amd64", "b" * 64, 7, "pool/main/b_5.3-1_amd64.deb")}
    assert renew.resolve([new], known, None) == [known[new]]
    assert renew.resolve([old], known, parse(GOOD)) == [parse(GOOD).packages["bash"]]
    with pytest.raises(PackagingError, match=r"does not have 1 of what was built with: bash 5\.2-1"):
        renew.resolve([old], known, None)


def test_what_is_not_built_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mkosi.version").write_text("9.9\n")
    unsigned = tmp_path / "build/unsigned"
    unsigned.mkdir(parents=True)
    (unsigned / "ai-assistant-test_9.9_x86-64.manifest").touch()
    monkeypatch.setattr(renew, "CHECKOUT", tmp_path)
    with pytest.raises(PackagingError) as caught:
        renew.manifests()
    assert "ai-assistant_9.9_x86-64.manifest, ai-assistant_9.9_x86-64.initrd.manifest" in str(caught.value)
    assert "ai-assistant-test_9.9_x86-64.manifest" not in str(caught.value)
    assert "ai-assistant-test_9.9_x86-64.initrd.manifest" in str(caught.value)


def test_the_index_is_the_same_every_time(tmp_path: Path) -> None:
    held = archive(tmp_path, "beta", "alpha")
    place = tmp_path / "dists" / held.suite
    folder.index(tmp_path, held)
    first = {path.name: path.read_bytes() for path in place.rglob("*") if path.is_file() and path.name[0] != "."}
    packages = first["Packages"].decode()
    assert packages.index("Package: alpha\nVersion: 1:2.1-1\n") < packages.index("Package: beta\nVersion: 1:2.0-1\n")
    assert f"Filename: {held.packages['beta'].path}\nSize: {held.packages['beta'].size}\nSHA256: " in packages
    for path in place.rglob("*"):
        if path.is_file():
            path.unlink()
    folder.index(tmp_path, held)
    again = {path.name: path.read_bytes() for path in place.rglob("*") if path.is_file() and path.name[0] != "."}
    assert again == first


def test_no_index_of_a_folder_that_is_not_as_locked(tmp_path: Path) -> None:
    held = archive(tmp_path, "alpha", "beta", "gamma")
    folder.index(tmp_path, held)
    content = bytearray((tmp_path / held.packages["alpha"].path).read_bytes())
    content[-1] ^= 1
    (tmp_path / held.packages["alpha"].path).write_bytes(content)
    (tmp_path / held.packages["gamma"].path).unlink()
    with pytest.raises(MirrorIncomplete, match=r"alpha \(its content is not as locked\), gamma \(missing\)"):
        folder.index(tmp_path, held)


@pytest.mark.parametrize(
    "content",
    [b"", b"!<arch>\n", b"ELF", deb("x", "1")[:90], deb("x", "1").replace(b"control.tar.xz", b"control.tar.zz")],
)
def test_a_package_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    held = Lock({"x": package("x", "1", content or b" ")})
    path = tmp_path / held.packages["x"].path
    path.parent.mkdir(parents=True)
    path.write_bytes(content or b" ")
    with pytest.raises(BadLock, match=r"x_1_all\.deb"):
        folder.index(tmp_path, held)


def test_keys_name_the_set_of_packages() -> None:
    assert parse(GOOD).key == parse(f"# a comment\n{GOOD}\n").key
    assert parse(GOOD).key != parse(GOOD.replace("5.2-1 ", "5.2-2 ")).key
    assert lock.parse(GOOD).suite == f"locked-{parse(GOOD).key}"


@pytest.mark.skipif(not shutil.which("apt-get"), reason="no apt on this host")
def test_apt_installs_from_the_folder_and_notices_another_content(tmp_path: Path) -> None:
    mirror, held = tmp_path / "mirror", archive(tmp_path / "mirror", "alpha", "beta")
    folder.index(mirror, held)
    apt.configure(tmp_path, apt.locked_sources(mirror, held), apt.pins(held))
    for each in ("state/lists/partial", "cache/archives/partial"):
        (tmp_path / each).mkdir(parents=True)
    (tmp_path / "status").touch()
    places = {"Dir::Etc": "etc/apt", "Dir::State": "state", "Dir::State::status": "status", "Dir::Cache": "cache"}
    options = [word for key, value in places.items() for word in ("-o", f"{key}={tmp_path / value}")]

    def apt_get(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["apt-get", *options, "-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User=", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert apt_get("-qq", "--error-on=any", "update").stderr == ""
    planned = apt_get("-s", "install", "alpha", "beta")
    assert "Inst alpha (1:2.0-1 ai-assistant" in planned.stdout, planned.stderr
    assert apt_get("download", "beta").returncode == 0
    assert next(tmp_path.glob("beta_*.deb")).stat().st_size == held.packages["beta"].size
    path = mirror / held.packages["alpha"].path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused = apt_get("download", "alpha")
    assert refused.returncode != 0
    assert "Hash Sum mismatch" in refused.stderr
