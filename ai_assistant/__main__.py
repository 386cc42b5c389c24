"""`python -m ai_assistant` is the command line."""

import sys

from ai_assistant.cli import main

if __name__ == "__main__":
    sys.exit(main())
