"""What image/keys and image/sign run: python3 -m image.signing keys|sign ..."""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> int:
    match arguments[:1]:
        case ["keys"]:
            from image.signing import keys

            return keys.main(arguments[1:])
        case ["sign"]:
            from image.signing import sign

            return sign.main(arguments[1:])
    print("signing: keys or sign", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
