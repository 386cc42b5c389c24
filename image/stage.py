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
import subprocess
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


# Where each shell looks for the completion of a command.
COMPLETIONS = {
    "bash": "usr/share/bash-completion/completions/ai-assistant",
    "zsh": "usr/share/zsh/vendor-completions/_ai-assistant",
    "fish": "usr/share/fish/vendor_completions.d/ai-assistant.fish",
}


def completion(shell: str, packages: Path) -> str:
    """The completion script that the command line itself makes."""
    program = "import sys; sys.argv = ['ai-assistant']; from ai_assistant.cli import main; sys.exit(main())"
    environment = {"PYTHONPATH": str(packages), "_AI_ASSISTANT_COMPLETE": f"source_{shell}", "LANG": "C.UTF-8"}
    done = subprocess.run(
        [sys.executable, "-B", "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    if "ai" not in done.stdout:
        sys.exit(f"stage: no completion for {shell}: {done.stderr}")
    return done.stdout.lstrip("\n")


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

    for room in ("daemon", "tee"):
        shutil.copytree(CHECKOUT / room / "data", PRODUCT, dirs_exist_ok=True)

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

    manual = PRODUCT / "usr/share/doc/ai-assistant"
    manual.mkdir(parents=True, exist_ok=True)
    for page in sorted((CHECKOUT / "docs").glob("*.md")):
        shutil.copy(page, manual)
    for shell, target in COMPLETIONS.items():
        script = PRODUCT / target
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(completion(shell, packages))

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
