"""Lay out the product as it will stand in the image's root: build/product.

Run in the tools tree, whose Python is the image's, so that the compiled bytecode fits:
    python3 image/stage.py ENGINE_FOLDER
"""

from __future__ import annotations

import compileall
import json
import os
import py_compile
import shutil
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
PRODUCT = CHECKOUT / "build" / "product"
LIBRARY = Path("usr/lib/ai-assistant")

LAUNCHER = """\
#!/usr/bin/python3
import sys

sys.path.insert(0, "/usr/lib/ai-assistant/python")
from ai_assistant.cli import main

if __name__ == "__main__":
    sys.exit(main())
"""


def ignore(folder: str, names: list[str]) -> set[str]:
    """What a room holds that the running product has no use for."""
    unwanted = {"__pycache__", "README.md", "recipe", "eval", "data"} if folder else set()
    return {name for name in names if name in unwanted or name.endswith((".gguf", ".pyc"))}


def stage(engine: Path) -> None:
    shutil.rmtree(PRODUCT, ignore_errors=True)
    packages = PRODUCT / LIBRARY / "python"
    # copytree follows the links of the rooms, so the image has real folders.
    shutil.copytree(CHECKOUT / "ai_assistant", packages / "ai_assistant", ignore=ignore)
    shutil.copytree(engine / "llama_cpp", packages / "llama_cpp", ignore=ignore, symlinks=True)
    version = (CHECKOUT / "mkosi.version").read_text().strip()
    (PRODUCT / LIBRARY / "version").write_text(version + "\n")

    shutil.copytree(CHECKOUT / "daemon" / "data", PRODUCT, dirs_exist_ok=True)

    for metadata in sorted((CHECKOUT / "models").glob("*.json")):
        about = json.loads(metadata.read_text())
        target = PRODUCT / LIBRARY / "models" / about["name"].split(":")[0] / str(about["version"])
        target.mkdir(parents=True)
        shutil.copy(metadata, target / "model.json")
        shutil.copy(metadata.with_suffix(".gguf"), target / "model.gguf")

    site = PRODUCT / "usr/lib/python3/dist-packages/ai-assistant.pth"
    site.parent.mkdir(parents=True)
    site.write_text("/usr/lib/ai-assistant/python\n")
    for name in ("ai-assistant", "ai_assistant"):
        launcher = PRODUCT / "usr/bin" / name
        launcher.parent.mkdir(parents=True, exist_ok=True)
        launcher.write_text(LAUNCHER)
        launcher.chmod(0o755)

    # Checked by hash, not by time: the image's file times are all the same.
    compiled = compileall.compile_dir(
        packages,
        stripdir=PRODUCT,
        prependdir="/",
        quiet=1,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    if not compiled:
        sys.exit("stage: a module does not compile")
    for path in PRODUCT.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)


if __name__ == "__main__":
    stage(Path(sys.argv[1]))
