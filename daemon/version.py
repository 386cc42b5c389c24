"""The product's version, for status and properties."""

from __future__ import annotations

import sys

# The package is loaded already. Importing it by name would count as importing the SDK, which the daemon must not.
VERSION: str = sys.modules[__name__.partition(".")[0]].__version__
