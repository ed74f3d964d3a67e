"""Pages on the programs: every command with its usage, arguments and options, taken from the parsers themselves."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from infra.site.text import code, definitions, joined, plain, sentence, table
from ota.errors import EXIT_CODES

COLUMNS = "80"  # of a usage line
WORDS = {"x>=": "{} or more", "x>": "more than {}", "x<=": "{} or less", "x<": "less than {}"}


@dataclass(frozen=True)
class Parameter:
    """An argument or an option."""

    term: str
    """Names and value, such as "-m, --message <str>"."""
    meaning: str
    default: str = ""
    variable: str = ""
    """Environment variable that gives the value, too."""
    bounds: str = ""
    required: bool = False


@dataclass(frozen=True)
class Command:
    """A command, or a group of commands."""

    words: str
    """How it is called, such as "ferry data add"."""
    usage: str
    about: list[str]
    """Paragraphs."""
    summary: str = ""
    """What it does, in one sentence."""
    arguments: list[Parameter] = field(default_factory=list)
    options: list[Parameter] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)

    def all(self) -> Iterator[Command]:
        """Yield the command itself and all below it."""
        yield self
        for command in self.commands:
            yield from command.all()


def ferry() -> Command:
    """Describe the command `ferry`."""
    import typer

    from flows.cli import app

    return _of_typer(typer.main.get_command(app), "ferry")


def ferry_agent() -> Command:
    """Describe the command `ferry-agent`."""
    from ota.agent.cli import parser

    with _without("FERRY_AGENT_DIR"):  # it would be taken for the default
        return _of_argparse(parser(), "ferry-agent")


def ferry_delta() -> Command | None:
    """Describe the command `ferry-delta`; None: this version has none."""
    if importlib.util.find_spec("ota.delta.cli") is None:
        return None
    return _of_argparse(importlib.import_module("ota.delta.cli").parser(), "ferry-delta")


def page(program: Command, about: str) -> str:
    """Write the page of a program.

    Args:
        program: the program.
        about: Markdown that follows the title.
    """
    below = list(program.all())[1:]
    overview = table(
        ("command", "what it does"),
        ((f"[{code(c.words)}](#{anchor(c.words)})", plain(c.summary)) for c in below if not c.commands),
    )
    paragraphs = (sentence(part) for part in program.about if not part.startswith("Exit codes:"))
    return joined(
        f"# {program.words}", *paragraphs, "The [exit code](exit-codes.md) says whether a command succeeded, and why not.", about,
        f"## Overview\n\n{overview}" if below else "",
        f"## Options before the command {{#{anchor(program.words)}}}\n\n{_usage(program)}" if below else _usage(program),
        *(_command(c) for c in below),
    )  # fmt: skip


def anchor(words: str) -> str:
    """Return the anchor of a command on the page of its program."""
    return words.replace(" ", "-")


def exit_codes() -> str:
    """Write the page of the exit codes of all programs."""
    codes = sorted({number for known in EXIT_CODES.values() for number in known})
    rows = [[f"`{number}`", *(plain(known.get(number, "–")) for known in EXIT_CODES.values())] for number in codes]
    return joined(
        "# Exit codes",
        "A program that ends with 0 did what was asked, or found nothing to do. Every other number names a kind of problem, and a sentence on "
        "stderr says what to do next.",
        table(("code", *map(code, EXIT_CODES)), rows),
    )


def _command(command: Command) -> str:
    below = ", ".join(f"[{code(c.words)}](#{anchor(c.words)})" for c in command.commands)
    return joined(
        f"## {command.words} {{#{anchor(command.words)}}}",
        *(sentence(part) for part in command.about),
        f"Commands: {below}." if below else "",
        _usage(command),
    )


def _usage(command: Command) -> str:
    return joined(
        f"```text\n{command.usage}\n```",
        f"**Arguments**\n\n{definitions(map(_row, command.arguments))}" if command.arguments else "",
        f"**Options**\n\n{definitions(map(_row, command.options))}" if command.options else "",
    )


def _row(parameter: Parameter) -> tuple[str, str]:
    said = [sentence(parameter.meaning)]
    said += ["Required."] if parameter.required else []
    said += [f"Allowed: {plain(parameter.bounds)}."] if parameter.bounds else []
    said += [f"Default: {code(parameter.default)}."] if parameter.default else []
    said += [f"Environment variable: [{code(parameter.variable)}](environment.md)."] if parameter.variable else []
    return code(parameter.term), " ".join(said)


# Typer


def _of_typer(command: Any, words: str) -> Command:
    context = command.make_context(words, [], resilient_parsing=True, terminal_width=int(COLUMNS), max_content_width=int(COLUMNS))
    known = [(p.param_type_name, _typer_parameter(p, context)) for p in command.params if not p.hidden]
    below = [_of_typer(c, f"{words} {name}") for name, c in getattr(command, "commands", {}).items() if not c.hidden]
    return Command(
        words=words,
        usage=command.get_usage(context).removeprefix("Usage: "),
        about=_paragraphs(command.help or ""),
        summary=_paragraphs(command.help or "")[0],
        arguments=[p for kind, p in known if kind == "argument"],
        options=[p for kind, p in known if kind == "option"],
        commands=below,
    )


def _typer_parameter(parameter: Any, context: Any) -> Parameter:
    """Take a parameter apart: its help ends with remarks in brackets, such as "[default: 30; x>=1]"."""
    term, text = parameter.get_help_record(context)
    meaning = parameter.help or ""
    remarks = text.removeprefix(meaning).strip().removeprefix("[").removesuffix("]")
    told = [remark for remark in remarks.split("; ") if remark]
    default = next((r.removeprefix("default: ") for r in told if r.startswith("default: ")), "")
    if parameter.secondary_opts:  # the remark names it without its dashes
        default = (parameter.opts if parameter.default else parameter.secondary_opts)[0]
    return Parameter(
        term=term,
        meaning=meaning,
        default=default,
        variable=next((r.removeprefix("env var: ") for r in told if r.startswith("env var: ")), ""),
        bounds="".join(_bounds(r) for r in told if re.search(r"\bx[<>]|[<>]=?x\b", r)),
        required="required" in told,
    )


def _bounds(remark: str) -> str:
    """Say a range such as "0<=x<=9" in words."""
    both = re.fullmatch(r"(.+)<=x<=(.+)", remark)
    if both:
        return f"{both[1]} to {both[2]}"
    sign = max((sign for sign in WORDS if remark.startswith(sign)), key=len)
    return WORDS[sign].format(remark.removeprefix(sign))


# argparse


def _of_argparse(parser: argparse.ArgumentParser, words: str, summary: str = "") -> Command:
    arguments: list[Parameter] = []
    options: list[Parameter] = []
    below: list[Command] = []
    for action in parser._actions:  # noqa: SLF001 - argparse has no public list
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            said = {choice.dest: choice.help or "" for choice in action._choices_actions}  # noqa: SLF001
            below = [_of_argparse(made, f"{words} {name}", said[name]) for name, made in action.choices.items()]
        elif not isinstance(action, argparse._HelpAction):  # noqa: SLF001 - the page says that every command has it
            (options if action.option_strings else arguments).append(_argparse_parameter(action))
    with _columns():
        usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    return Command(
        words=words, usage=_wrapped(usage), about=_paragraphs(parser.description or ""), summary=summary,
        arguments=arguments, options=options, commands=below,
    )  # fmt: skip


def _argparse_parameter(action: argparse.Action) -> Parameter:
    value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    shown = bool(re.search(r"\(%\(default\)s\)", action.help or ""))
    named = ", ".join(action.option_strings) or value
    return Parameter(
        term=f"{named} {value}" if action.option_strings and action.nargs != 0 else named,
        meaning=(action.help or "").replace(" (%(default)s)", "") % vars(action),
        default=str(action.default) if shown else "",
        required=action.required,
    )


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip())]


def _wrapped(usage: str) -> str:
    """Break a long usage line between options."""
    lines, indent = [""], " " * 4
    for part in re.findall(r"\[[^\]]*\](?:\.\.\.)?|--?[\w-]+ [A-Z]\S*|\S+", usage):
        if len(lines[-1]) + 1 + len(part) > int(COLUMNS):
            lines.append(indent + part)
        else:
            lines[-1] = f"{lines[-1]} {part}".lstrip() if len(lines) == 1 else f"{lines[-1]} {part}"
    return "\n".join(lines)


@contextmanager
def _columns() -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = COLUMNS
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


@contextmanager
def _without(name: str) -> Iterator[None]:
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
