"""`python -m aiter_inductor COMMAND`."""

from __future__ import annotations

import sys

from aiter_inductor.cli.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
