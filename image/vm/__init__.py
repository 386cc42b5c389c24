"""Virtual machines for trying and testing the image; image/README.md says what is where."""

from image.vm.accelerator import accelerator
from image.vm.agent import Answer
from image.vm.disk import Disk, Failing
from image.vm.machine import VM, ExtraDisk, Hardware
from image.vm.process import VMError

__all__ = ["VM", "Answer", "Disk", "ExtraDisk", "Failing", "Hardware", "VMError", "accelerator"]
