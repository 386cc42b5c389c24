"""Whether a device can be used, and if not, what helps.

The order of questions: is it handed to somebody else – has it a driver – has the driver made a node – may this process
open the node – does somebody else hold it. A driver that is there while the node is not almost always means firmware:
the kernel's log says so where it can be read, otherwise the missing file does.
"""

from __future__ import annotations

import errno
import fnmatch
import grp
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ai_assistant.hal.detect import sysfs
from ai_assistant.hal.detect.ids import Driver, Known, Table
from ai_assistant.hal.detect.sysfs import Sysfs
from ai_assistant.hal.device import DriverState

PASSED_ON = {"vfio-pci": "a virtual machine", "pci-stub": "nobody: it is reserved", "xen-pciback": "a virtual machine"}
MAX_ALIASES = 16 << 20
MAX_RECORDS = 20_000

_FAILED = re.compile(r"(?:Direct firmware load for|firmware: failed to load) ([\w./+-]{1,200}?)(?: failed| \(|$)")


@dataclass(frozen=True, slots=True)
class State:
    state: DriverState
    hint: str = ""


WORKING = State(DriverState.WORKING)


def judge(
    machine: Sysfs,
    device: Path,
    bound: str,
    nodes: Sequence[str],
    known: Known | None,
    table: Table,
) -> State:
    """Args:
    device: its folder in sysfs.
    bound: the driver that has it, empty: none.
    nodes: what programs could open.
    """
    if bound in PASSED_ON:
        return State(
            DriverState.HELD_BY_ANOTHER,
            f"it was handed to {PASSED_ON[bound]} ({bound}); unbind it there to use it here",
        )
    driver = table.drivers.get(bound) or table.drivers.get(known.driver if known else "")
    if nodes:
        return usable(machine, nodes, driver)
    modules = aliases(machine, _modalias(device))
    if driver is None and modules and not bound:
        driver = table.drivers.get(modules[0])
    module = bound or (driver.module if driver else "") or (modules[0] if modules else "")
    if bound or (module and machine.has_module(module)):
        return _without_node(machine, device, bound, module, driver, known)
    return State(DriverState.NO_DRIVER, _driver_hint(machine, device, module, modules, driver, known))


def usable(machine: Sysfs, nodes: Sequence[str], driver: Driver | None) -> State:
    """Whether this process may open the nodes, and nobody keeps it from doing so."""
    group = driver.group if driver else "render"
    for node in nodes:
        path = machine.path(node)
        if not os.access(path, os.R_OK | os.W_OK):
            if not os.path.lexists(path):
                # In a container without its /dev: as good as forbidden.
                return State(DriverState.NO_PERMISSION, f"{node} is not there: hand it to this container or service")
            return State(DriverState.NO_PERMISSION, _group_hint(node, path, group))
        if driver and driver.exclusive and _held(path):
            return State(DriverState.HELD_BY_ANOTHER, f"another program has {node} open: end it, or wait (lsof {node})")
    return WORKING


def _held(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def _group_hint(node: str, path: Path, group: str) -> str:
    try:
        status = path.stat()
        owner = grp.getgrgid(status.st_gid).gr_name
        # The group that has the node is the better answer than the one that usually has it, unless that is root's.
        if owner != "root" and status.st_mode & 0o060 == 0o060:
            group = owner
    except (OSError, KeyError):
        pass
    if not group:
        return f"{node} is not open to this user: a udev rule has to give it to a group"
    return f"{node} is open to the group {group}: usermod -aG {group} USER, or SupplementaryGroups={group} in a service"


def _without_node(
    machine: Sysfs, device: Path, bound: str, module: str, driver: Driver | None, known: Known | None
) -> State:
    logged = missing_in_log(machine, device.name)
    needed, package = _firmware(device, driver, known)
    if logged or (needed and not any(machine.has_firmware(name) for name in needed)):
        file = logged or needed[0]
        if package:
            what = f"install {package}, then load the driver again (modprobe -r {module}; modprobe {module}) or restart"
        else:
            what = "Debian has no package with it: it comes from the vendor"
        return State(DriverState.FIRMWARE_MISSING, f"the driver {module} does not find its firmware {file}: {what}")
    what = (
        f"has it, but made no {driver.node if driver else 'device'} node" if bound else "is loaded, but did not take it"
    )
    return State(DriverState.NO_DRIVER, f"the driver {module} {what}; the reason is in: journalctl -k -g {device.name}")


def _firmware(device: Path, driver: Driver | None, known: Known | None) -> tuple[tuple[str, ...], str]:
    own = known.revisions.get(sysfs.text(device / "revision"), known.firmware) if known else ()
    needed = own or (driver.firmware if driver else ())
    return needed, (known.package if known else "") or (driver.package if driver else "")


def _driver_hint(
    machine: Sysfs,
    device: Path,
    module: str,
    modules: Sequence[str] | None,
    driver: Driver | None,
    known: Known | None,
) -> str:
    needed, package = _firmware(device, driver, known)
    also = ""
    if needed and package and not any(machine.has_firmware(name) for name in needed):
        also = f"; it also needs firmware: install {package}"
    if modules:
        best = module if module in modules else modules[0]
        return f"the kernel has its driver, which is not loaded: modprobe {best} (or is it in a blacklist?){also}"
    release = machine.kernel()
    this = f"this kernel ({release})" if release else "this kernel"
    if driver and driver.source:
        return f"{this} has no driver for it: install {driver.source}{also}"
    if driver and driver.since and older(release, driver.since):
        return (
            f"{this} is too old: the driver {module} came with Linux {driver.since}; "
            f"install a newer one (linux-image from trixie-backports, where it has it){also}"
        )
    if module and modules is None:
        return f"its driver {module} is not loaded: modprobe {module}{also}"
    return f"{this} was built without {f'the driver {module}' if module else 'a driver for it'}{also}"


def older(release: str, since: str) -> bool:
    """Whether a kernel's release comes before a version; not when either is unknown."""
    numbers = [re.match(r"(\d{1,4})\.(\d{1,4})", text) for text in (release, since)]
    if numbers[0] is None or numbers[1] is None:
        return False
    have, need = (tuple(map(int, match.groups())) for match in numbers if match)
    return have < need


def _modalias(device: Path) -> str:
    return sysfs.text(device / "modalias") or sysfs.uevent(device).get("MODALIAS", "")


def aliases(machine: Sysfs, modalias: str) -> list[str] | None:
    """The modules of the running kernel that say they drive a device, by its `modalias`; None: it cannot be known."""
    release = machine.kernel()
    lines = sysfs.lines(machine.path("lib/modules", release, "modules.alias"), MAX_ALIASES) if release else []
    if not lines or not modalias:
        return None
    found: list[str] = []
    for line in lines:
        _, pattern, module = (*line.split(" ", 2), "", "")[:3]
        # The whole pattern is compared only where its beginning fits: there are tens of thousands.
        begins = re.match(r"[^*?\[]+", pattern)
        if begins is None or not modalias.startswith(begins[0]) or module in found:
            continue
        if fnmatch.fnmatchcase(modalias, pattern):
            found.append(sysfs.clean(module))
    return found


def missing_in_log(machine: Sysfs, device: str) -> str:
    """The firmware that the kernel's log says a device lacks; empty when it says nothing, or may not be read."""
    found = ""
    path = machine.path("dev/kmsg")
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return ""
    try:
        for _ in range(MAX_RECORDS):
            try:
                record = os.read(handle, 16 * 1024)
            except BrokenPipeError:
                continue  # the kernel overwrote what came next: go on with the oldest that is left
            if not record:
                break
            for line in record.decode("utf-8", "replace").splitlines():
                if f" {device}:" in line and (match := _FAILED.search(line)):
                    found = match[1]
    except OSError:
        pass  # EAGAIN: that was all
    finally:
        os.close(handle)
    return found
