"""The bill of materials names everything once, the same way every time."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path
from typing import Any

import pytest

from image import sbom
from image.signing.errors import ImageError

CHECKOUT = Path(__file__).resolve().parents[2]


def manifest(path: Path, *packages: tuple[str, str, str]) -> Path:
    rows = [{"type": "deb", "name": name, "version": version, "architecture": a} for name, version, a in packages]
    config = {"name": "ai-assistant-test", "version": "0.1.0", "release": "trixie", "distribution": "debian"}
    path.write_text(json.dumps({"manifest_version": 1, "config": config, "packages": rows}))
    return path


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with one locked package."""
    root = tmp_path / "checkout"
    for folder in ("image", "models", "requirements"):
        (root / folder).mkdir(parents=True)
    for name in ("mkosi.conf", "mkosi.version", "requirements/engine.txt", "models/assistant-1.json"):
        (root / name).write_text((CHECKOUT / name).read_text())
    locked = f"libstdc++6 14.2.0-19 amd64 {'ab' * 32} 700000 pool/main/g/gcc-14/libstdc++6_14.2.0-19_amd64.deb\n"
    (root / "image/packages.lock").write_text("# locked\n" + locked)
    return root


@pytest.fixture
def bom(tmp_path: Path, checkout: Path) -> dict[str, Any]:
    root = manifest(tmp_path / "root", ("libstdc++6", "14.2.0-19", "amd64"), ("dbus", "1:1.16.2-2~x+b1", "amd64"))
    initrd = manifest(tmp_path / "initrd", ("libstdc++6", "14.2.0-19", "amd64"), ("cpio", "2.15", "all"))
    return dict(json.loads(sbom.document(root, initrd, checkout)))


def component(bom: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [each for each in bom["components"] if each["name"] == name]
    return dict(found)


def test_a_package_in_two_parts_is_one_component(bom: dict[str, Any]) -> None:
    shared = component(bom, "libstdc++6")
    assert [each["value"] for each in shared["properties"]] == ["initrd", "root"]
    assert shared["hashes"] == [{"alg": "SHA-256", "content": "ab" * 32}]
    assert [each["value"] for each in component(bom, "cpio")["properties"]] == ["initrd"]
    assert "hashes" not in component(bom, "cpio")


def test_package_urls_are_escaped(bom: dict[str, Any]) -> None:
    assert component(bom, "libstdc++6")["purl"] == ("pkg:deb/debian/libstdc%2B%2B6@14.2.0-19?arch=amd64&distro=trixie")
    assert component(bom, "dbus")["purl"] == ("pkg:deb/debian/dbus@1%3A1.16.2-2~x%2Bb1?arch=amd64&distro=trixie")


def test_the_engine_the_model_and_the_product_are_there(bom: dict[str, Any]) -> None:
    locked = (CHECKOUT / "requirements/engine.txt").read_text()
    engine = component(bom, "llama-cpp-python")
    assert f"llama-cpp-python=={engine['version']} " in locked
    assert engine["hashes"]
    for each in engine["hashes"]:
        assert f"sha256:{each['content']}" in locked
    about = json.loads((CHECKOUT / "models/assistant-1.json").read_text())
    assert component(bom, about["name"])["hashes"] == [{"alg": "SHA-256", "content": about["sha256"]}]
    assert component(bom, "ai-assistant")["version"] == (CHECKOUT / "mkosi.version").read_text().strip()


def test_it_is_cyclonedx(bom: dict[str, Any]) -> None:
    assert (bom["bomFormat"], bom["specVersion"], bom["version"]) == ("CycloneDX", "1.6", 1)
    assert uuid.UUID(bom["serialNumber"].removeprefix("urn:uuid:")).version == 5
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", bom["metadata"]["timestamp"])
    references = [bom["metadata"]["component"]["bom-ref"], *(each["bom-ref"] for each in bom["components"])]
    assert len(set(references)) == len(references)
    (whole,) = bom["dependencies"]
    assert whole["ref"] == references[0]
    assert set(whole["dependsOn"]) == set(references[1:])
    for each in bom["components"]:
        assert each["type"] in {"application", "library", "machine-learning-model"}
        assert each["name"]
        assert each["version"]


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path, checkout: Path) -> None:
    packages = [("dbus", "1", "amd64"), ("cpio", "2", "all")]
    one = sbom.document(manifest(tmp_path / "one", *packages), None, checkout)
    assert sbom.document(manifest(tmp_path / "two", *reversed(packages)), None, checkout) == one
    other = sbom.document(manifest(tmp_path / "three", *packages, ("kmod", "3", "amd64")), None, checkout)
    assert json.loads(other)["serialNumber"] != json.loads(one)["serialNumber"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"packages": [{"type": "deb"}]}', '{"packages": 1}', "\x00"])
def test_what_is_no_manifest_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.manifest"
    path.write_text(text)
    with pytest.raises(ImageError, match="no manifest"):
        sbom.document(path)
    with pytest.raises(ImageError, match="cannot read"):
        sbom.document(tmp_path / "missing")
