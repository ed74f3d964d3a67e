"""The command `ferry`: parse, call one function, print. Each group of commands has a module; `main` puts them together."""

from flows.cli.main import app, main

__all__ = ["app", "main"]
