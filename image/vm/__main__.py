"""Boot the built image in QEMU: OVMF, a software TPM, the image's own boot loader, kernel and verity root.

Run it in the tools tree:
    image/toolbox python3 -m image.vm boot [--image FILE] [--memory MIB]     the console on this terminal
    image/toolbox python3 -m image.vm accelerator                            kvm or tcg
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from image.container import image_path
from image.vm import VM, VMError, accelerator


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vm", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("action", choices=("boot", "accelerator"))
    parser.add_argument("--image", type=Path, default=image_path())
    parser.add_argument("--memory", type=int, default=4096, help="MiB")
    parser.add_argument("--secure-boot", action="store_true", help="from setup mode: the boot loader enrols the keys")
    options = parser.parse_args(arguments)
    if options.action == "accelerator":
        print(accelerator())
        return 0
    print(f"Booting under {accelerator()}; Ctrl-A X ends the machine.", flush=True)
    try:
        with VM(
            options.image,
            memory_mib=options.memory,
            secure_boot=options.secure_boot,
            disk_gib=8,
            interactive=True,
            internet=True,
        ) as machine:
            machine.power_on()
            return machine.wait()
    except VMError as error:
        print(f"vm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
