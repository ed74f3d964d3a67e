"""The command `ferry` and nothing else: parse, call one function, print. A module for each group of commands; `main` puts them together."""

from flows.cli.main import app, main

__all__ = ["app", "main"]
