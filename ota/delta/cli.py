"""The command `ferry-delta`: what `ferry delta` does, for people who want nothing else of DeltaFerry.

It is argparse, not the library that `ferry` has, so it needs nothing but what `ota.delta` needs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import ota
from ota.delta import commands
from ota.errors import OtaError, exit_codes, printable

Arguments = argparse.Namespace


def parser() -> argparse.ArgumentParser:
    """Define all commands and their options."""
    root = argparse.ArgumentParser(
        "ferry-delta", description=f"{commands.ABOUT}\n\n{textwrap.fill(exit_codes('ferry-delta'), 100)}",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    root.add_argument("--debug", action="store_true", help="Show tracebacks.")
    root.add_argument("--version", action="version", version=f"ferry-delta {ota.__version__}", help="Print the version and stop.")
    subparsers = root.add_subparsers(metavar="COMMAND", title="commands")

    def command(does: Callable[[Arguments], commands.Answer]) -> argparse.ArgumentParser:
        about = commands.HELP[does.__name__]
        made = subparsers.add_parser(
            does.__name__, help=about.partition("\n")[0], description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        )  # fmt: skip
        made.set_defaults(does=does, json=False)
        return made

    def options(made: argparse.ArgumentParser, *known: tuple[str, str]) -> None:
        for name, about in known:
            made.add_argument(name, type=_named, metavar="FILE", help=about)

    def output(made: argparse.ArgumentParser, about: str) -> None:
        made.add_argument("-o", "--output", type=_named, metavar="FILE", required=True, help=about)

    def answers_json(made: argparse.ArgumentParser) -> None:
        made.add_argument("--json", action="store_true", help=commands.JSON)

    made = command(build)
    made.add_argument("old", type=_named, metavar="OLD", help=commands.OLD)
    made.add_argument("new", type=_named, metavar="NEW", help=commands.NEW_OF_MODEL)
    output(made, commands.OUTPUT_OF_BUILD)
    options(made, ("--graph", commands.GRAPH), ("--old-graph", commands.OLD_GRAPH), ("--factors", commands.FACTORS))
    answers_json(made)

    made = command(apply)
    made.add_argument("old", type=_named, metavar="OLD", help=commands.OLD_OF_DELTA)
    made.add_argument("patch", type=_named, metavar="PATCH", help=commands.PATCH)
    output(made, commands.OUTPUT_OF_APPLY)

    made = command(inspect)
    made.add_argument("patch", type=_named, metavar="PATCH", help=commands.PATCH)
    options(made, ("--of", commands.OF), ("--from", commands.FROM), ("--graph", commands.GRAPH), ("--plot", commands.PLOT))
    answers_json(made)

    made = command(estimate)
    made.add_argument("old", type=_named, metavar="OLD", help=commands.OLD)
    made.add_argument("new", type=_named, metavar="NEW", help=commands.NEW)
    options(made, ("--graph", commands.GRAPH), ("--old-graph", commands.OLD_GRAPH), ("--factors", commands.FACTORS))
    answers_json(made)
    return root


def _named(text: str) -> Path:
    try:
        return commands.named(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def build(given: Arguments) -> commands.Answer:
    """Pass what was given to `commands.build`."""
    return commands.build(given.old, given.new, given.output, given.graph, given.old_graph, given.factors)


def apply(given: Arguments) -> commands.Answer:
    """Pass what was given to `commands.apply`."""
    return commands.apply(given.old, given.patch, given.output)


def inspect(given: Arguments) -> commands.Answer:
    """Pass what was given to `commands.inspect`."""
    return commands.inspect(given.patch, given.of, getattr(given, "from"), given.graph, given.plot)


def estimate(given: Arguments) -> commands.Answer:
    """Pass what was given to `commands.estimate`."""
    return commands.estimate(given.old, given.new, given.graph, given.old_graph, given.factors)


def call(words: list[str]) -> int:
    """Run what the words after `ferry-delta` say.

    Returns:
        the exit code.

    Raises:
        SystemExit: wrong usage, or help was asked for.
    """
    speaks = parser()
    given = speaks.parse_args(words)
    if "does" not in given:
        speaks.print_help(sys.stderr)
        return 2
    commands.use_one_thread()
    if not given.debug:
        warnings.simplefilter("ignore")  # warnings of libraries are not for the user
    try:
        answer = given.does(given)
        _print(sys.stdout, json.dumps(answer.value) if given.json else printable(answer.text, len(answer.text), keep="\n"))
    except OtaError as error:
        if given.debug:
            raise
        return _fail(str(error), 3)
    except OSError as error:
        if given.debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}; check the path and who may write there", 3)
    except KeyboardInterrupt:
        return _fail(f"interrupted; {commands.AFTER_INTERRUPT}", 130)
    return 0


def _print(stream: TextIO | None, text: str) -> None:
    if stream:  # None: it was closed when the program started
        stream.write(f"{text}\n")
        stream.flush()


def _fail(message: str, code: int) -> int:
    _print(sys.stderr, f"ferry-delta: {printable(message)}")
    return code


def main() -> None:
    """Run the command `ferry-delta`."""
    try:
        sys.exit(call(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream:
                    stream.flush()
            except OSError:  # it was reported already; at its end Python would try again and change the exit code
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    main()
