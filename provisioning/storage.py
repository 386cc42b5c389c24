"""/var: made at the first boot, opened at every boot, with its recovery key. Runs as root, early in the boot.

    python3 -m ai_assistant.provisioning.storage start      ai-assistant-storage.service
    python3 -m ai_assistant.provisioning.storage recovery   ai-assistant-recovery.service
    python3 -m ai_assistant.provisioning.storage reseal     after a boot with the recovery key: the TPM opens again

With a TPM, /var is LUKS2 with a key that the TPM gives out in this Secure Boot state (PCR 7) to images with a signed
policy (PCR 11). Without one it is plain. A removable disk is a live system: /var is in memory and nothing is written.
/run/ai-assistant-storage/state.json tells the rest of the system which it is; README.md has its fields.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ai_assistant.errors import AIAssistantError
from ai_assistant.provisioning import firmware
from ai_assistant.provisioning.errors import DiskFailed, DiskTooSmall
from ai_assistant.provisioning.partitioning import (
    Disk,
    Partition,
    boot_disk,
    partition,
    repair_table,
    run,
)

RUNTIME = Path("/run/ai-assistant-storage")
MOUNTED = RUNTIME / "var"
# Only while the machine runs that was opened with it, for `reseal`.
OPENED_WITH = RUNTIME / "opened-with"
PENDING = RUNTIME / "recovery-pending"
RECOVERY = Path("/var/lib/ai-assistant-recovery")
DEFINITIONS = Path("/usr/lib/ai-assistant/repart")
CRYPTSETUP = "/usr/lib/systemd/systemd-cryptsetup"
# PCR 7: Secure Boot and its keys, as they are now. PCR 11: any image whose policy our key has signed.
BINDING = (
    "--tpm2-pcrs=7",
    "--tpm2-public-key=/run/systemd/tpm2-pcr-public-key.pem",
    "--tpm2-public-key-pcrs=11",
)
_MODHEX = "cbdefghijklnrtuv"


@dataclass(frozen=True, slots=True)
class State:
    """What state.json says. `encryption` is tpm2, none or volatile; `reason` says why it is not tpm2."""

    encryption: str
    reason: str
    opened_by: str
    first_boot: bool
    device: str
    secure_boot: str
    tpm: bool


def say(text: str) -> None:
    """To every console, a monitor and the serial line alike; not to the journal."""
    with suppress(OSError):
        for name in Path("/sys/class/tty/console/active").read_text().split():
            with suppress(OSError), (Path("/dev") / name).open("w") as console:
                console.write(f"\r\n{text}\r\n".replace("\n", "\r\n").replace("\r\r", "\r"))


def write_atomically(path: Path, text: str, mode: int) -> None:
    partial = path.with_name(f".{path.name}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w") as file:
        os.fchmod(descriptor, mode)
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    partial.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def start() -> State:
    """Have /var's file system at MOUNTED, whatever state the disk is in, and say in state.json which it is."""
    MOUNTED.mkdir(parents=True, exist_ok=True)
    disk = boot_disk()
    state = State("volatile", "", "", False, "", firmware.secure_boot(), firmware.tpm_works())
    if disk.removable:
        state = replace(state, reason="this is a live system on a removable disk")
        return _volatile(state)
    if repair_table(disk):
        print("storage: the primary partition table was damaged and is written again from the backup")
        disk = boot_disk()
    try:
        if not any(each.label for each in disk.partitions):
            raise DiskFailed(f"the partition table of {disk.device} cannot be read")
        if disk.labelled("var") is None:
            state = replace(state, first_boot=True)
            state = _first_boot(disk, state)
            disk = boot_disk()
        found = disk.labelled("var")
        if found is None:
            raise DiskFailed(f"{disk.device} has no state partition after partitioning")
        return _open(found, state)
    except Exception as error:  # whatever it is, the machine must come up and say so
        message = error.message if isinstance(error, AIAssistantError) else f"{type(error).__name__}: {error}"
        say(f"Storage: {message}.\nThe machine runs without its disk: nothing of this session is kept.")
        print(f"storage: {message}", file=sys.stderr)
        return _volatile(replace(state, reason=message))


def _first_boot(disk: Disk, state: State) -> State:
    slots = DEFINITIONS / "slots"
    if state.tpm:
        say("First boot: the disk is being prepared and encrypted. This takes a moment.")
        try:
            partition(disk, [slots, DEFINITIONS / "tpm2"], ["--tpm2-device=auto", *BINDING])
            return state
        except DiskTooSmall:
            raise
        except DiskFailed as error:
            # A machine that serves unencrypted and says so is better than none.
            say(f"The TPM could not be used: {error.message}.\n/var will not be encrypted.")
            print(f"storage: no encryption: {error.message}", file=sys.stderr)
            partition(disk, [slots, DEFINITIONS / "plain"])
            return replace(state, reason=f"the TPM could not be used at the first boot: {error.message}")
    partition(disk, [slots, DEFINITIONS / "plain"])
    return state


def _volatile(state: State) -> State:
    run(["mount", "-t", "tmpfs", "-o", "mode=0755,nodev,size=50%", "tmpfs", MOUNTED])
    return replace(state, encryption="volatile", device="")


def is_luks(device: Path) -> bool:
    with device.open("rb") as file:
        return file.read(6) == b"LUKS\xba\xbe"


def _open(found: Partition, state: State) -> State:
    state = replace(state, device=str(found.device))
    if not is_luks(found.device):
        _mount(found.device)
        return replace(state, encryption="none", reason=state.reason or _why_plain(state))
    state = replace(state, encryption="tpm2", reason="")
    if (failure := attach(found.device, "tpm2-device=auto")) is None:
        state = replace(state, opened_by="tpm2")
    else:
        _ask_for_recovery_key(found.device, why_closed(failure, state))
        state = replace(state, opened_by="recovery-key")
    _mount(Path("/dev/mapper/var"))
    return state


def _why_plain(state: State) -> str:
    if not state.tpm:
        return "this machine has no TPM"
    return "there was no usable TPM at the first boot"


def why_closed(failure: str, state: State) -> str:
    """In words, why the TPM did not open /var. `failure` is what systemd-cryptsetup said."""
    text = failure.lower()
    if not state.tpm:
        return "the TPM that holds its key is missing or switched off"
    if "lockout" in text:
        return "the TPM is locked after too many wrong attempts"
    if state.secure_boot != "on":
        return (
            "the TPM does not give out its key in this state of the machine, "
            f"in which Secure Boot is {'not set up' if state.secure_boot == 'setup' else state.secure_boot}"
        )
    if any(word in text for word in ("policy", "pcr", "mismatch", "state not recoverable")):
        return (
            "the TPM does not give out its key in this state of the machine: "
            "Secure Boot or its keys were changed, or the image is not one that our key has signed"
        )
    return "the TPM was cleared or is another one: it does not know the key"


def attach(device: Path, options: str, key_file: Path | None = None) -> str | None:
    """Open LUKS as /dev/mapper/var; None, or what went wrong."""
    if Path("/dev/mapper/var").exists():
        return None
    options = f"{options},headless=true,discard,tries=1"
    done = run([CRYPTSETUP, "attach", "var", device, key_file or "-", options])
    if done.returncode == 0:
        return None
    print(done.stderr, file=sys.stderr)
    return str(done.stderr)


def normalised(key: str) -> str:
    """A recovery key as systemd-cryptenroll printed it, however it was typed."""
    letters = re.sub(r"[^a-z]", "", key.lower())
    if len(letters) != 64 or set(letters) - set(_MODHEX):
        return key.strip()
    return "-".join(letters[i : i + 8] for i in range(0, 64, 8))


def _ask_for_recovery_key(device: Path, reason: str) -> None:
    """Until the right one comes; a machine that is in doubt about its state waits for its owner."""
    say(
        f"Storage: /var stays closed: {reason}.\n"
        "Nothing is lost. Type the recovery key that was shown after the first boot."
    )
    print(f"storage: /var stays closed: {reason}; waiting for the recovery key", flush=True)
    while True:
        asked = run(["systemd-ask-password", "--timeout=0", "--id=ai-assistant:var", "Recovery key:"])
        if asked.returncode != 0:
            time.sleep(1)
            continue
        write_atomically(OPENED_WITH, normalised(str(asked.stdout)), 0o600)
        if attach(device, "", OPENED_WITH) is None:
            say("Storage: /var is open.")
            return
        OPENED_WITH.unlink()
        say("That is not the recovery key of this device.")


def _mount(device: Path) -> None:
    check = run(["fsck.ext4", "-p", device])
    if check.returncode >= 4:
        print(f"storage: repairing {device}: {check.stdout}{check.stderr}", file=sys.stderr)
        run(["fsck.ext4", "-y", device])
    done = run(["mount", "-t", "ext4", "-o", "nodev", device, MOUNTED])
    if done.returncode != 0:
        raise DiskFailed(
            f"the state partition is damaged and was left as it is ({done.stderr.strip().splitlines()[-1]})"
        )


def _state() -> State:
    try:
        return State(**json.loads((RUNTIME / "state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DiskFailed(
            f"{RUNTIME / 'state.json'} cannot be used: {error}",
            hint="ai-assistant-storage.service writes it at every boot; see its journal",
        ) from error


def _unlock_option() -> str:
    # Gone after a reseal: from then on the TPM opens it.
    return f"--unlock-key-file={OPENED_WITH}" if OPENED_WITH.exists() else "--unlock-tpm2-device=auto"


def recovery() -> None:
    """Have a recovery key in RECOVERY until its owner acknowledges it, and show it on the consoles."""
    state = _state()
    if state.encryption != "tpm2":
        return
    if state.opened_by == "recovery-key" and state.tpm and state.secure_boot == "on":
        # The owner's key opened it on a machine in a known state: from the next boot on the TPM does again.
        reseal()
    RECOVERY.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (RECOVERY / "acknowledged").exists():
        # Also after a cut between the two steps of an acknowledgement.
        (RECOVERY / "key").unlink(missing_ok=True)
        return
    if not (RECOVERY / "key").exists():
        # One from before a power cut was never seen by anybody.
        command = ["systemd-cryptenroll", "--wipe-slot=recovery", "--recovery-key", _unlock_option()]
        done = run([*command, state.device])
        key = str(done.stdout).strip()
        if done.returncode != 0 or normalised(key).count("-") != 7:
            raise DiskFailed(f"no recovery key could be made: {done.stderr.strip()}")
        write_atomically(RECOVERY / "key", key + "\n", 0o600)
    PENDING.touch()
    key = (RECOVERY / "key").read_text().strip()
    say(
        "Recovery key of this device – write it down and keep it elsewhere:\n\n"
        f"    {key}\n\n"
        "It opens the disk when the TPM does not. It is shown at every boot until you say\n"
        "    ai-assistant storage acknowledge"
    )


def reseal() -> None:
    """Bind /var to the TPM as the machine is now, with the recovery key that opened it.

    Raises:
        DiskFailed: not opened with a recovery key, or the TPM refused.
    """
    state = _state()
    if state.encryption != "tpm2":
        raise DiskFailed("/var is not encrypted", hint=state.reason)
    if state.opened_by == "recovery-key" and not OPENED_WITH.exists():
        return
    command = ["systemd-cryptenroll", "--wipe-slot=tpm2", "--tpm2-device=auto", *BINDING, _unlock_option()]
    done = run([*command, state.device])
    if done.returncode != 0:
        raise DiskFailed(f"the TPM could not be used: {str(done.stderr).strip().splitlines()[-1]}")
    OPENED_WITH.unlink(missing_ok=True)
    print("storage: /var is bound to the TPM in this state of the machine")


def main(arguments: Sequence[str]) -> int:
    verbs: dict[str, Callable[[], object]] = {"recovery": recovery, "reseal": reseal}
    os.umask(0o077)
    try:
        if list(arguments) == ["start"]:
            state = start()
            RUNTIME.chmod(0o755)
            write_atomically(RUNTIME / "state.json", json.dumps(asdict(state)) + "\n", 0o644)
        elif len(arguments) == 1 and arguments[0] in verbs:
            verbs[arguments[0]]()
        else:
            print(__doc__, file=sys.stderr)
            return 2
    except AIAssistantError as error:
        print(f"storage: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  hint: {error.hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
