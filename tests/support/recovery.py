"""A machine below a folder whose storage is described, and whose recovery key waits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

KEY = "-".join(["cbdefghi", "jklnrtuv", "ccbbddee", "ffgghhii", "jjkkllnn", "rrttuuvv", "vutrnlkj", "ihgfedbc"])
OTHER = KEY[::-1]
ENCRYPTED: dict[str, Any] = {
    "encryption": "tpm2",
    "reason": "",
    "opened_by": "tpm2",
    "first_boot": True,
    "device": "/dev/vda6",
    "secure_boot": "on",
    "tpm": True,
}
PLAIN: dict[str, Any] = {
    "encryption": "none",
    "reason": "this machine has no TPM",
    "opened_by": "",
    "first_boot": False,
    "device": "/dev/vda6",
    "secure_boot": "off",
    "tpm": False,
}


def describe(root: Path, record: dict[str, Any] | bytes) -> Path:
    """Write the storage's record, as JSON unless it is bytes."""
    path = root / "run/ai-assistant-storage/state.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(record if isinstance(record, bytes) else json.dumps(record).encode())
    return path


def key_waits(root: Path, key: str | bytes = KEY + "\n") -> Path:
    """Put a recovery key where the first boot puts it, with the flag that everybody may see; the key's file."""
    folder = root / "var/lib/ai-assistant-recovery"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    path = folder / "key"
    path.touch(mode=0o600)
    path.write_bytes(key if isinstance(key, bytes) else key.encode())
    flag(root).parent.mkdir(parents=True, exist_ok=True)
    flag(root).touch()
    return path


def flag(root: Path) -> Path:
    return root / "run/ai-assistant-storage/recovery-pending"
