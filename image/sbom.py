"""The bill of materials of an image: CycloneDX 1.6, from what the build already wrote down.

    mkosi's manifests        every Debian package of the root and of the initrd
    image/packages.lock      their hashes
    requirements/engine.txt  the Python artefacts that are compiled in
    models/*.json            the built-in models

The same inputs give the same bytes: the serial number comes from the content, the time from SourceDateEpoch.
"""

from __future__ import annotations

import json
import re
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from image.signing.errors import ImageError
from image.signing.tools import CHECKOUT, epoch

Component = dict[str, Any]
_NAMESPACE = uuid.UUID("6f0c7a4e-53f4-5d0b-8f0e-3c7f6a1d2b90")
_PART = "ai-assistant:part"


def _hashes(values: list[str]) -> dict[str, list[dict[str, str]]]:
    return {"hashes": [{"alg": "SHA-256", "content": value} for value in values]} if values else {}


def lock(path: Path) -> dict[tuple[str, str, str], str]:
    """SHA-256 of each locked package by name, version and architecture; empty where there is no lock."""
    if not path.exists():
        return {}
    rows = (line.split() for line in path.read_text().splitlines() if line and not line.startswith("#"))
    return {(row[0], row[1], row[2]): row[3] for row in rows if len(row) >= 4}


def _manifest(path: Path) -> dict[str, Any]:
    wrong = ImageError(f"{path} is no manifest of mkosi's", "build it again: make image")
    try:
        content = json.loads(path.read_text())
        rows = content["packages"]
        if not all({"type", "name", "version", "architecture"} <= each.keys() for each in rows):
            raise wrong
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror}", "make image") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise wrong from None
    return dict(content)


def packages(parts: dict[str, Path], hashes: dict[tuple[str, str, str], str]) -> list[Component]:
    """One component for each Debian package, with the parts of the image (root, initrd) that it is in."""
    found: dict[tuple[str, str, str], set[str]] = {}
    release = {}
    for part, path in parts.items():
        content = _manifest(path)
        for each in content["packages"]:
            if each["type"] == "deb":
                key = (str(each["name"]), str(each["version"]), str(each["architecture"]))
                found.setdefault(key, set()).add(part)
                release[key] = content.get("config", {}).get("release", "trixie")
    components = []
    for key, places in sorted(found.items()):
        name, version, architecture = key
        purl = (
            f"pkg:deb/debian/{quote(name, safe='')}@{quote(version, safe='~')}"
            f"?arch={architecture}&distro={release[key]}"
        )
        components.append(
            {
                "type": "library",
                "bom-ref": purl,
                "name": name,
                "version": version,
                **_hashes([hashes[key]] if key in hashes else []),
                "purl": purl,
                "properties": [{"name": _PART, "value": place} for place in sorted(places)],
            }
        )
    return components


def python_artefacts(requirements: Path) -> list[Component]:
    """The locked Python artefacts that are built into the image."""
    components = []
    text = requirements.read_text().replace("\\\n", " ")
    for name, version, rest in re.findall(r"^([A-Za-z0-9][\w.-]*)==(\S+)(.*)$", text, re.MULTILINE):
        purl = f"pkg:pypi/{name.lower().replace('_', '-')}@{quote(version, safe='')}"
        components.append(
            {
                "type": "library",
                "bom-ref": purl,
                "name": name,
                "version": version,
                **_hashes(re.findall(r"--hash=sha256:([0-9a-f]{64})", rest)),
                "purl": purl,
                "properties": [{"name": _PART, "value": "root"}],
            }
        )
    return components


def models(folder: Path) -> list[Component]:
    """The built-in models, described by the JSON beside each."""
    components = []
    for path in sorted(folder.glob("*.json")):
        about = json.loads(path.read_text())
        components.append(
            {
                "type": "machine-learning-model",
                "bom-ref": f"model:{about['name']}",
                "name": about["name"],
                "version": str(about["version"]),
                **_hashes([about["sha256"]]),
                "licenses": [{"license": {"id": about["license"]}}],
                "properties": [{"name": _PART, "value": "root"}],
            }
        )
    return components


def document(manifest: Path, initrd: Path | None = None, checkout: Path = CHECKOUT) -> bytes:
    """The bill of materials of one image, as JSON.

    Raises:
        ImageError: a manifest is not there, or is none.
    """
    config = _manifest(manifest).get("config", {})
    version = (checkout / "mkosi.version").read_text().strip()
    product = f"pkg:generic/ai-assistant@{quote(version, safe='')}"
    image = f"image:{config.get('name', 'ai-assistant')}@{config.get('version', version)}"
    parts = {"root": manifest, **({"initrd": initrd} if initrd else {})}
    own: Component = {
        "type": "application",
        "bom-ref": product,
        "name": "ai-assistant",
        "version": version,
        "licenses": [{"license": {"id": "Apache-2.0"}}],
        "purl": product,
        "properties": [{"name": _PART, "value": "root"}],
    }
    components = [
        own,
        *models(checkout / "models"),
        *python_artefacts(checkout / "requirements" / "engine.txt"),
        *packages(parts, lock(checkout / "image" / "packages.lock")),
    ]
    bom: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": datetime.fromtimestamp(epoch(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": {
                "type": "operating-system",
                "bom-ref": image,
                "name": str(config.get("name", "ai-assistant")),
                "version": str(config.get("version", version)),
                "licenses": [{"license": {"id": "Apache-2.0"}}],
            },
        },
        "components": components,
        "dependencies": [{"ref": image, "dependsOn": sorted(each["bom-ref"] for each in components)}],
    }
    content = json.dumps(bom, sort_keys=True)
    bom["serialNumber"] = f"urn:uuid:{uuid.uuid5(_NAMESPACE, content)}"
    return (json.dumps(bom, indent=1) + "\n").encode()
