"""``python -m benchmarks``: measures and, unless told otherwise, writes ``benchmarks/report/``."""

from __future__ import annotations

import sys
from pathlib import Path

from .lab.suite import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not any(arg == "--out" or arg.startswith("--out=") for arg in arguments) and not {
        "--list",
        "-h",
        "--help",
        "--json",
    } & set(arguments):
        arguments = ["--out", str(Path(__file__).parent / "report"), *arguments]
    sys.exit(main(arguments))
