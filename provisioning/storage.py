"""/var: made at the first boot, opened at every boot, with its recovery key. Runs as root, early in the boot.

    python3 -m ai_assistant.provisioning.storage start      ai-assistant-storage.service
    python3 -m ai_assistant.provisioning.storage recovery   ai-assistant-recovery.service
    python3 -m ai_assistant.provisioning.storage reseal     after a boot with the recovery key: the TPM opens again

With a TPM, /var is LUKS2 with a key that the TPM gives out in this Secure Boot state (PCR 7), to images with a signed
policy (PCR 11), until /var is mounted: then PCR 15 is extended, so that whoever puts another /var in its place and runs
code from it does not get the key of the real one. Without a TPM it is plain. A removable disk is a live system: /var is
in memory and nothing is written. state.json tells the rest of the system which it is; README.md has its fields.
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
from ai_assistant.provisioning.errors import DiskFailed
from ai_assistant.provisioning.partitioning import (
    SYSFS,
    Disk,
    boot_disk,
    last_line,
    partition,
    repair_table,
    run,
)

RUNTIME = Path("/run/ai-assistant-storage")
# For root alone: what it holds is all of /var, on a way that units do not think of when they hide parts of it.
PRIVATE = RUNTIME / "private"
MOUNTED = PRIVATE / "var"
# Only while the machine runs that was opened with it, for `reseal`.
OPENED_WITH = PRIVATE / "opened-with"
# repart/encrypted copies it into the new /var.
SEED = PRIVATE / "seed"
PENDING = RUNTIME / "recovery-pending"
RECOVERY = Path("/var/lib/ai-assistant-recovery")
DEFINITIONS = Path("/usr/lib/ai-assistant/repart")
RELEASE_KEY = Path("/usr/lib/ai-assistant/keys/secure-boot.crt")
CRYPTSETUP = "/usr/lib/systemd/systemd-cryptsetup"
PCREXTEND = "/usr/lib/systemd/systemd-pcrextend"
# PCR 7: Secure Boot and its keys, as they are now. PCR 11: any image whose policy our key has signed. PCR 15: nothing
# of any /var has been looked at yet.
BINDING = (
    f"--tpm2-pcrs=7+15:sha256={'0' * 64}",
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
    """Have /var's file system at MOUNTED, whatever state the disk is in, and return which it is."""
    PRIVATE.mkdir(mode=0o700, parents=True, exist_ok=True)
    MOUNTED.mkdir(exist_ok=True)
    state = State("volatile", "", "", False, "", firmware.secure_boot(), firmware.tpm_works())
    try:
        state, device = _open(state)
        _close_tpm(state)
        if device is not None:
            _mount(device)
            return state
    except Exception as error:  # whatever it is, the machine must come up and say so
        message = error.message if isinstance(error, AIAssistantError) else f"{type(error).__name__}: {error}"
        say(f"Storage: {message}.\nThe machine runs without its disk: nothing of this session is kept.")
        print(f"storage: {message}", file=sys.stderr)
        state = replace(state, reason=message)
        # Of this /var nothing is run, so no harm is done when this fails as well.
        with suppress(AIAssistantError):
            _close_tpm(state)
    state = replace(state, encryption="volatile", opened_by="", device="")
    run(["mount", "-t", "tmpfs", "-o", "mode=0755,nodev,size=50%", "tmpfs", MOUNTED])
    return state


def _open(state: State) -> tuple[State, Path | None]:
    """The device to mount as /var, made and opened if need be; none on a removable disk."""
    disk = boot_disk()
    if disk.removable:
        return replace(state, reason="this is a live system on a removable disk"), None
    if repair_table(disk):
        print("storage: the primary partition table was damaged and is written again from the backup")
        disk = boot_disk()
    if not any(each.label for each in disk.partitions):
        raise DiskFailed(f"the partition table of {disk.device} cannot be read")
    if disk.labelled("var") is None:
        state = _first_boot(disk, replace(state, first_boot=True))
        disk = boot_disk()
    found = disk.labelled("var")
    if found is None:
        raise DiskFailed(f"{disk.device} has no state partition after partitioning")
    state = replace(state, device=str(found.device))
    if not is_luks(found.device):
        return replace(state, encryption="none", reason=state.reason or _why_plain(state)), found.device
    if write_protected(found.device):
        raise DiskFailed(f"{found.device} is write-protected")
    state = replace(state, encryption="tpm2", reason="")
    failure = attach(found.device, "tpm2-device=auto")
    if failure is None:
        state = replace(state, opened_by="tpm2")
    else:
        _check_luks(found.device)
        _ask_for_recovery_key(found.device, why_closed(failure, state))
        state = replace(state, opened_by="recovery-key")
    return state, Path("/dev/mapper/var")


def _close_tpm(state: State) -> None:
    """From here on the TPM gives out no key of any /var in this boot: before the first byte of it is looked at."""
    if not state.tpm:
        return
    done = run([PCREXTEND, "--graceful", "--pcr=15", f"ai-assistant-storage:{state.encryption}"])
    if done.returncode != 0:
        raise DiskFailed(f"the TPM could not be told that /var is used: {last_line(done.stderr)}")


def _first_boot(disk: Disk, state: State) -> State:
    slots = DEFINITIONS / "slots"
    if state.tpm:
        say("First boot: the disk is being prepared and encrypted. This takes a moment.")
        try:
            _encrypted(disk, slots)
            return state
        except TPMRefused as error:
            # A machine that serves unencrypted and says so is better than none.
            say(f"The TPM could not be used: {error.message}.\n/var will not be encrypted.")
            print(f"storage: no encryption: {error.message}", file=sys.stderr)
            state = replace(state, reason=f"the TPM could not be used at the first boot: {error.message}")
    partition(disk, [slots, DEFINITIONS / "plain"])
    return state


class TPMRefused(DiskFailed):
    """The TPM did not take the key; nothing was written that counts."""


def _encrypted(disk: Disk, slots: Path) -> None:
    """LUKS that the recovery key opens, with that key inside; then the TPM. Both before the table has the partition."""
    key = new_recovery_key()
    SEED.mkdir(mode=0o700, exist_ok=True)
    write_atomically(SEED / "key", key + "\n", 0o600)
    passphrase = PRIVATE / "passphrase"
    write_atomically(passphrase, key, 0o600)

    def bind(device: Path) -> None:
        done = run(["systemd-cryptenroll", f"--unlock-key-file={passphrase}", "--tpm2-device=auto", *BINDING, device])
        if done.returncode != 0:
            raise TPMRefused(last_line(done.stderr))

    try:
        partition(disk, [slots, DEFINITIONS / "encrypted"], [f"--key-file={passphrase}"], bind)
    finally:
        passphrase.unlink(missing_ok=True)
        (SEED / "key").unlink(missing_ok=True)


def new_recovery_key() -> str:
    """256 random bits in systemd's letters for recovery keys, which lie in the same place on most keyboards."""
    letters = "".join(_MODHEX[byte >> 4] + _MODHEX[byte & 15] for byte in os.urandom(32))
    return normalised(letters)


def is_luks(device: Path) -> bool:
    with device.open("rb") as file:
        return file.read(6) == b"LUKS\xba\xbe"


def _check_luks(device: Path) -> None:
    """Before anybody is asked for a key: is it the key that is missing?"""
    if run(["cryptsetup", "luksDump", device]).returncode != 0:
        raise DiskFailed("the header of the state partition is damaged; it was left as it is")


def write_protected(device: Path, sysfs: Path = SYSFS) -> bool:
    number = device.stat().st_rdev
    return (sysfs / f"dev/block/{os.major(number)}:{os.minor(number)}/ro").read_text().strip() != "0"


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
    # Its answers to these are too much alike to tell them apart.
    return (
        "the TPM does not give out its key: Secure Boot's keys were changed, the image is not one "
        "that our key has signed, or the TPM was cleared or is another one"
    )


def attach(device: Path, options: str, key_file: Path | None = None) -> str | None:
    """Open LUKS as /dev/mapper/var; None, or what went wrong."""
    if Path("/dev/mapper/var").exists():
        return None
    options = f"{options},headless=true,discard,tries=1"
    done = run([CRYPTSETUP, "attach", "var", device, key_file or "-", options])
    if done.returncode == 0:
        return None
    print(done.stderr, file=sys.stderr)
    return done.stderr


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
        write_atomically(OPENED_WITH, normalised(asked.stdout), 0o600)
        failure = attach(device, "", OPENED_WITH)
        if failure is None:
            say("Storage: /var is open.")
            return
        OPENED_WITH.unlink()
        if not is_wrong_key(failure):
            raise DiskFailed(f"the state partition cannot be opened: {last_line(failure)}")
        say("That is not the recovery key of this device.")


def is_wrong_key(failure: str) -> bool:
    """Whether systemd-cryptsetup refused the key, and not the disk the opening."""
    return "incorrect" in failure.lower() or "not permitted" in failure.lower()


def _mount(device: Path) -> None:
    check = run(["fsck.ext4", "-p", device])
    if check.returncode >= 4:
        print(f"storage: repairing {device}: {check.stdout}{check.stderr}", file=sys.stderr)
        run(["fsck.ext4", "-y", device])
    done = run(["mount", "-t", "ext4", "-o", "rw,nodev", device, MOUNTED])
    if done.returncode != 0:
        raise DiskFailed(f"the state partition is damaged and was left as it is ({last_line(done.stderr)})")
    if os.statvfs(MOUNTED).f_flag & os.ST_RDONLY:
        run(["umount", MOUNTED])
        raise DiskFailed("the state partition can only be read")


def _state() -> State:
    try:
        return State(**json.loads((RUNTIME / "state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DiskFailed(
            f"{RUNTIME / 'state.json'} cannot be used: {error}",
            hint="ai-assistant-storage.service writes it at every boot; see its journal",
        ) from error


def recovery() -> None:
    """Show the recovery key until its owner acknowledges it; after one had to be typed, bind /var to the TPM again."""
    state = _state()
    if state.encryption != "tpm2":
        return
    if state.opened_by == "recovery-key" and state.tpm and firmware.only_our_keys(RELEASE_KEY):
        # The owner's key opened it, and Secure Boot takes our signatures alone: from the next boot on the TPM does.
        try:
            reseal()
        except DiskFailed as error:
            print(f"storage: {error.message}", file=sys.stderr)
    RECOVERY.chmod(0o700)
    waiting = RECOVERY / "key"
    if not waiting.exists():
        return
    # Loads OpenSSL, which `start`, that every boot waits for, does not need.
    import hashlib

    key = waiting.read_text().strip()
    # The vault writes the hash of the key that was acknowledged; a power cut may have left that key.
    with suppress(OSError):
        if (RECOVERY / "acknowledged").read_text().strip() == hashlib.sha256(key.encode()).hexdigest():
            waiting.unlink()
            return
    PENDING.touch(mode=0o644)
    PENDING.chmod(0o644)
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
    if not OPENED_WITH.exists():
        if state.opened_by == "recovery-key":
            print("storage: /var has been bound to the TPM in this boot already")
            return
        raise DiskFailed("the TPM has opened /var, so there is nothing to bind anew")
    # First away with the binding that does not open: where there is one with the same policy systemd-cryptenroll does
    # nothing, and another TPM has the same policy. Until the new one is there, the recovery key opens.
    for change in (["--wipe-slot=tpm2"], ["--tpm2-device=auto", *BINDING]):
        done = run(["systemd-cryptenroll", f"--unlock-key-file={OPENED_WITH}", *change, state.device])
        if done.returncode != 0:
            raise DiskFailed(f"the TPM could not be used: {last_line(done.stderr)}")
    OPENED_WITH.unlink()
    print("storage: /var is bound to the TPM in this state of the machine")


def main(arguments: Sequence[str]) -> int:
    verbs: dict[str, Callable[[], object]] = {"recovery": recovery, "reseal": reseal}
    # Secrets have modes of their own; folders that systemd-repart makes in the new /var are everybody's.
    os.umask(0o022)
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
