"""The command `ferry`: parse, call one function, print. Each group of commands has a module; `main` puts them together."""

import sys

try:
    from flows.cli.main import app, main
except KeyboardInterrupt:  # modules load for a moment before a command begins
    sys.stderr.write("ferry: interrupted; repeat the command to go on\n")
    sys.exit(130)

__all__ = ["app", "main"]
