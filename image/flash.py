"""Write an image to a USB stick or disk.

    image/flash IMAGE DEVICE                      a file and a disk
    image/flash --profile production DEVICE       what make image has built
    image/flash --list                            the disks of this machine

Refuses disks that are in use, asks before it erases, shows progress, reads everything back. Needs Python 3.11
and nothing else; writing to a device needs root. What runs from the disk then is the live system, and
docs/install.md says how to go on.

Exit status: 0 done, 1 error, 2 wrong usage, 3 not authorised, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ai_assistant.cli.disk import Meter, agreed, as_json, can_ask, listed
from ai_assistant.cli.output import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_USAGE, Output, duration, exit_status, size
from ai_assistant.errors import AIAssistantError, NotAuthorized
from ai_assistant.provisioning import images
from ai_assistant.provisioning.disks import Machine
from ai_assistant.provisioning.flash import flash, refuse
from image.container import image_path

PROFILES = ("developer", "production", "test")


def main(arguments: Sequence[str] | None = None, machine: Machine | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="image/flash",
        usage="%(prog)s [OPTIONS] {IMAGE | --profile PROFILE} DEVICE\n       %(prog)s --list [--json]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "operands", nargs="*", metavar="IMAGE DEVICE", help="the image's file, and a whole disk or a file"
    )
    parser.add_argument("--profile", choices=PROFILES, help="take the image that was built of this profile")
    parser.add_argument("--list", action="store_true", help="list the disks, and why one cannot be written to")
    parser.add_argument("--force", action="store_true", help="write even if the disk is in use; still asks")
    parser.add_argument("--yes", "-y", action="store_true", help="do not ask for the device's name")
    parser.add_argument(
        "--no-verify", action="store_true", help="neither check the image nor read back what is written"
    )
    parser.add_argument("--sha256", metavar="HEX", default="", help="the image must have this SHA-256")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(arguments)
    out = Output(json=options.json)
    wanted = 0 if options.list else 1 if options.profile else 2
    if len(options.operands) != wanted:
        parser.error("give an image (or --profile) and a device" if wanted else "--list stands alone")
    machine = machine or Machine()
    try:
        if options.list:
            listed(out, machine.disks(), 0)
            return 0
        path = image_path(options.profile) if options.profile else Path(options.operands[0])
        return _run(out, path, options.operands[-1], options, machine)
    except AIAssistantError as error:
        out.error(error.name, error.message, error.hint)
        return exit_status(error)
    except KeyboardInterrupt as interrupt:
        hint = "run the same command again" if interrupt.args else ""
        out.error("Cancelled", str(interrupt) or "interrupted; nothing was changed", hint)
        return EXIT_INTERRUPTED
    except OSError as error:
        out.error("DiskFailed", f"{error.filename or 'input or output'}: {error.strerror}")
        return EXIT_ERROR


def _run(out: Output, path: Path, device: str, options: argparse.Namespace, machine: Machine) -> int:
    image = images.inspect(path)
    disk = machine.disk(device)
    refuse(image, disk, machine, force=options.force)
    if not os.access(disk.path, os.R_OK | os.W_OK):
        raise NotAuthorized(f"{disk.path} may not be written to", hint="run it as root: sudo image/flash …")
    if not options.yes and not can_ask(out):
        out.error("Usage", f"{disk.path} would be erased, and there is no terminal to ask on", "say --yes")
        return EXIT_USAGE
    if not options.yes and not agreed(out, disk, f"Writing {image.path.name} ({size(image.size_bytes)}) to"):
        return EXIT_ERROR
    started = time.monotonic()
    with Meter(out) as progress:
        if options.sha256:
            images.check_sum(image, options.sha256, progress)
        if not options.no_verify:
            images.check(image, progress)
        flash(image, disk, exclusive=not options.force, check=not options.no_verify, progress=progress)
    seconds = time.monotonic() - started
    if out.json:
        out.document(
            {
                **as_json(disk),
                "image": str(image.path),
                "image_bytes": image.size_bytes,
                "root_hash": image.root_hash,
                "verified": not options.no_verify,
                "seconds": round(seconds, 1),
            }
        )
    else:
        done = "written" if options.no_verify else "written and verified"
        out.line(f"{disk.path}: {image.path.name} {done} in {duration(seconds)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
