"""Downloads of packages for any architecture: with a false apt-get, since the real one needs the network."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ai_assistant.errors import AIAssistantError, BackendFailed, DownloadFailed, NoSpace, NotSupported, Timeout
from bench import _children, _debian
from bench._debian import Ledger, Packages, fetched, wanted

APT = """\
#!/bin/sh
# apt-get -c CONFIGURATION -q [OPTION ...] VERB [NAME ...]; fails as $FAIL says, writes down what it was asked.
folder=$(dirname "$2"); shift 3
echo "$*" >>"$CALLS"
case "$*" in
    update) [ -z "$FAIL" ] || { echo "$FAIL" >&2; exit 100; }
        echo "Fetched 1,234 kB in 1s (99 kB/s)" ;;
    --print-uris*) echo "'http://127.0.0.1/one_1_arm64.deb' one_1_arm64.deb 3 SHA256:00"
        echo "'http://127.0.0.1/two_1_all.deb' two_1_all.deb 4 " ;;
    *) printf abc >"$folder/cache/archives/one_1_arm64.deb"
        [ -z "$FAIL_LATE" ] || { echo "$FAIL_LATE" >&2; exit 100; }
        printf abcd >"$folder/cache/archives/two_1_all.deb" ;;
esac
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The false apt-get is on the path; what it is asked is in this file."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "apt-get").write_text(APT)
    (programs / "apt-get").chmod(0o755)
    written = tmp_path / "calls"
    written.touch()
    for name, value in {
        "CALLS": str(written),
        "FAIL": "",
        "FAIL_LATE": "",
        "MIRROR": "http://127.0.0.1/debian",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return written


@pytest.fixture
def packages(tmp_path: Path) -> Packages:
    return Packages("arm64", ("one", "two"), tmp_path / "cache")


def test_everything_is_downloaded_once(calls: Path, packages: Packages) -> None:
    packages.download()
    assert [line.split()[0] for line in calls.read_text().splitlines()] == ["update", "--print-uris", "--yes"]
    assert packages.bytes == {"index": 1_234_000, "packages": 7}
    assert [each.name for each in packages.files] == ["one_1_arm64.deb", "two_1_all.deb"]
    first = packages.ledger.values
    assert first["since"].endswith("UTC")
    packages.download()
    assert len(calls.read_text().splitlines()) == 4  # only what would be needed
    assert packages.ledger.values == first


def test_apt_is_asked_for_that_architecture_alone(calls: Path, packages: Packages) -> None:
    packages.download()
    assert 'APT::Architecture "arm64";' in (packages.folder / "apt.conf").read_text()
    sources = (packages.folder / "debian.sources").read_text()
    assert sources.count("Architectures: arm64\nTypes: deb\n") == sources.count("Types:") > 1
    assert "Signed-By:" in sources


def test_a_download_that_was_stopped_goes_on_and_counts(
    calls: Path, packages: Packages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL_LATE", "E: Could not connect")
    with pytest.raises(DownloadFailed, match="Could not connect") as error:
        packages.download()
    assert "network" in error.value.hint
    spent = packages.ledger.seconds("packages")
    assert spent > 0
    assert not packages.ledger.done("packages")
    monkeypatch.setenv("FAIL_LATE", "")
    packages.download()
    assert packages.ledger.seconds("packages") > spent
    assert calls.read_text().count("update") == 1


def test_a_download_that_was_killed_starts_anew(calls: Path, packages: Packages) -> None:
    packages.download()
    stray = packages.folder / "cache/archives/stray_1_arm64.deb"
    stray.touch()
    values = packages.ledger.values | {"open": "packages"}
    (packages.folder / "ledger.json").write_text(json.dumps(values))
    packages.download()
    assert not stray.exists()
    assert calls.read_text().count("update") == 2


def test_other_packages_are_another_folder(tmp_path: Path) -> None:
    folders = {
        Packages(architecture, names, tmp_path).folder
        for architecture, names in (("arm64", ("a",)), ("amd64", ("a",)), ("arm64", ("a", "b")))
    }
    assert len(folders) == 3
    assert Packages("arm64", ("b", "a"), tmp_path).folder == Packages("arm64", ("a", "b"), tmp_path).folder


@pytest.mark.parametrize(
    ("said", "kind", "message"),
    [
        ("E: Unable to locate package two", NotSupported, "no package two"),
        ("E: Package 'two' has no installation candidate", NotSupported, "no package two"),
        ("E: Failed to fetch x  404  Not Found", NotSupported, "no longer"),
        ("E: Write error - write (28: No space left on device)", NoSpace, "full"),
        ("E: You don't have enough free space in /x/.", NoSpace, "full"),
        ("W: NO_PUBKEY 0123\nE: The repository is not signed.", DownloadFailed, "signature"),
        ("E: Failed to fetch x  Temporary failure resolving", DownloadFailed, "Temporary failure"),
        ("nothing that anybody knows", DownloadFailed, "status 100"),
    ],
)
def test_what_went_wrong_is_named_and_has_a_hint(
    said: str,
    kind: type[AIAssistantError],
    message: str,
    calls: Path,
    packages: Packages,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAIL", said)
    with pytest.raises(AIAssistantError, match=message) as error:
        packages.download()
    assert type(error.value) is kind
    assert error.value.hint


def test_no_apt_at_all(packages: Packages, monkeypatch: pytest.MonkeyPatch, calls: Path) -> None:
    (calls.parent / "programs/apt-get").unlink()
    monkeypatch.setattr(_debian, "_sources", lambda architecture: "")
    monkeypatch.setenv("PATH", str(calls.parent / "programs"))
    with pytest.raises(NotSupported, match="apt-get is not installed"):
        packages.download()


def test_what_apt_prints_is_understood_or_left_out() -> None:
    text = (
        "'http://x/a.deb' a_1%3a2_arm64.deb 12 SHA256:ab\n'http://x/b.deb' b_1_all.deb 5 \n"
        "'http://x/c.deb' c_1_all.deb -5 MD5Sum:1\n'http://x/d' d 7 MD5Sum:1\nReading package lists...\n''' x\n"
    )
    assert wanted(text) == {"a_1%3a2_arm64.deb": 12, "b_1_all.deb": 5}
    assert wanted("") == {}
    assert fetched("Get:1 x\nFetched 10.2 MB in 1s (10.7 MB/s)\n") == 10_200_000
    assert fetched("Fetched 512 B in 0s (1 B/s)") == 512
    assert fetched("nothing new") == 0


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"since": 5}', "\0\0", '{"seconds": []}'])
def test_a_damaged_ledger_is_not_believed(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(content)
    assert not Ledger(path).trusted
    assert Ledger(tmp_path / "none.json").trusted


def test_a_step_that_fails_is_not_done_and_its_time_counts(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"

    def stopped() -> None:
        with Ledger(path).timed("index"):
            assert not Ledger(path).trusted  # what a kill would leave
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    again = Ledger(path)
    assert again.trusted
    assert not again.done("index")
    assert again.seconds("index") > 0
    with again.timed("index"):
        pass
    assert Ledger(path).done("index")


def test_a_program_is_run_to_its_end() -> None:
    done = _children.run([sys.executable, "-c", "import sys; print('a'); print('b'); sys.exit('why')"])
    assert (done.status, done.output, done.error) == (1, "a\nb\n", "why\n")
    assert 0 < done.first_s <= done.seconds


def test_a_program_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    beat = tmp_path / "beat"
    with pytest.raises(Timeout):
        _children.run(["sh", "-c", f"(while :; do date +%s%N >{beat}; sleep 0.05; done) & wait"], timeout_s=0.5)
    last = beat.read_text()
    time.sleep(0.3)
    assert beat.read_text() == last


def test_an_interrupt_ends_the_program(tmp_path: Path) -> None:
    beat = tmp_path / "beat"

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _children.run(["sh", "-c", f"while :; do date +%s%N >{beat}; sleep 0.05; done"], watch=interrupt)
    last = beat.read_text()
    time.sleep(0.3)
    assert beat.read_text() == last


# ---- with the real dpkg-deb


def package(folder: Path, name: str, files: dict[str, str]) -> Path:
    tree = folder / f"tree-{name}"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: arm64\n"
        "Maintainer: Nobody <nobody@example.invalid>\nDescription: x\n"
    )
    for path, content in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(content)
    made = folder / f"{name}_1_arm64.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, made], check=True, capture_output=True)
    return made


@pytest.mark.tools
def test_packages_are_unpacked_with_the_links_of_their_scripts(tmp_path: Path, packages: Packages) -> None:
    archives = packages.folder / "cache/archives"
    archives.mkdir(parents=True)
    package(archives, "libblas3", {"usr/lib/aarch64-linux-gnu/blas/libblas.so.3": "code"})
    package(archives, "base-files", {"etc/debian_version": "13"})
    assert packages.files[0].name.startswith("base-files_")
    root = tmp_path / "root"
    root.mkdir()
    packages.unpack(root)
    link = root / "usr/lib/aarch64-linux-gnu/libblas.so.3"
    assert link.is_symlink()
    assert link.read_text() == "code"
    assert not link.readlink().is_absolute()
    packages.unpack(root)  # over what is there


@pytest.mark.tools
def test_one_file_of_a_package(tmp_path: Path, packages: Packages) -> None:
    archives = packages.folder / "cache/archives"
    archives.mkdir(parents=True)
    package(
        archives, "qemu-user", {"usr/bin/qemu-arm": "no", "usr/bin/qemu-aarch64": "yes", "usr/bin/zzz": "x" * 10**6}
    )
    target = tmp_path / "emulator"
    packages.extract("qemu-user", "usr/bin/qemu-aarch64", target)
    assert target.read_text() == "yes"
    assert target.stat().st_mode & 0o777 == 0o755
    with pytest.raises(NotSupported, match="has no usr/bin/qemu-vax"):
        packages.extract("qemu-user", "usr/bin/qemu-vax", target)
    with pytest.raises(NotSupported, match="nobody has no"):
        packages.extract("nobody", "usr/bin/qemu-aarch64", target)


@pytest.mark.tools
@pytest.mark.parametrize("content", [b"", b"!<arch>\n", b"\xff" * 4096])
def test_a_damaged_package_is_said(content: bytes, tmp_path: Path, packages: Packages) -> None:
    archives = packages.folder / "cache/archives"
    archives.mkdir(parents=True)
    (archives / "one_1_arm64.deb").write_bytes(content)
    with pytest.raises(BackendFailed, match="one_1_arm64") as error:
        packages.unpack(tmp_path)
    assert "--fresh" in error.value.hint
    with pytest.raises(NotSupported):
        packages.extract("one", "usr/bin/x", tmp_path / "x")
