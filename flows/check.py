"""Find everything that is wrong with a ferry.toml, each with its line and what to write instead.

`flows.settings.read` stops at the first mistake, which is right for a command that needs the settings. Here, what is wrong is
noted and taken out, and the rest is checked again, until nothing wrong is left. So a mistake hides no other.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from flows.errors import WorkspaceError
from flows.settings import FORMAT, FORMATS, SUCCESSORS, Settings, Stores
from model.folder import shown
from model.scorecard import Frozen
from ota.release.compatibility import minimum_agent, newest_form
from ota.wording import counted

SINCE_INTERVALS = 3  # form of a bundle since which agents know turbo and intervals of guidance
ROUNDS = 100  # in each, at least one mistake is taken out
Loc = tuple[int | str, ...]
HEADER = re.compile(r"\s*\[{1,2}\s*([^\]]+?)\s*\]{1,2}")
OF_NOTHING = re.compile(r"Value error, ((?:gpu|energy)\.[a-z0-9-]+\.[A-Za-z0-9-]+) names ")  # a rule of `Settings`
KEY = re.compile(r"\s*([A-Za-z0-9_\-.\"' ]+?)\s*=")


class Problem(Frozen):
    """A mistake in ferry.toml."""

    key: str
    line: int | None
    message: str

    @property
    def text(self) -> str:
        """The mistake on one line."""
        where = ", ".join(part for part in (f"line {self.line}" if self.line else "", self.key) if part)
        return f"{where}: {self.message}" if where else self.message


def problems(path: Path) -> list[Problem]:
    """Find all mistakes in a ferry.toml, in the order of its lines; empty: it is right.

    Raises:
        WorkspaceError: it cannot be read.
    """
    try:
        text = path.read_bytes().decode()
        given = tomllib.loads(text)
    except OSError as error:
        raise WorkspaceError(f"{path} cannot be read: {error.strerror}; check who may read it") from error
    except UnicodeDecodeError as error:
        return [
            Problem(key="", line=None, message=f"the file is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8")
        ]
    except tomllib.TOMLDecodeError as error:
        at = re.search(r" \(at line (\d+), column \d+\)$", str(error))
        said = f"this is not valid TOML: {str(error)[: at.start()] if at else error}; correct it, then check again"
        if at and (header := re.match(r"\s*\[\s*(lines|gpu|energy)\s*\.[^\]]*[^\x00-\x7f]", text.splitlines()[int(at[1]) - 1])):
            said = f"a name in [{header[1]}...] has other letters than a to z; use lower-case letters, digits and '-', at most 40"
        return [Problem(key="", line=int(at[1]) if at else None, message=said)]
    found: dict[tuple[str, str], Problem] = {}
    for loc, message in _mistakes(given):
        key = ".".join(str(part) for part in loc)
        found.setdefault((key, message), Problem(key=shown(key), line=line_of(text, loc), message=message))
    return sorted(found.values(), key=lambda problem: (problem.line is None, problem.line or 0))


def _mistakes(given: dict[str, Any]) -> Iterator[tuple[Loc, str]]:
    """Yield all mistakes; what is wrong is taken out of `given`, so that the rest can be checked."""
    if (schema := given.get("schema")) not in FORMATS or isinstance(schema, bool):
        newer = isinstance(schema, int) and schema > FORMAT
        yield (
            ("schema",),
            f"it is {schema}, the format of a newer version of ferry; install that version"
            if newer
            else f"write schema = {FORMAT} at the beginning of the file",
        )
        given["schema"] = FORMAT
    emptied: set[Loc] = set()
    renamed: dict[int | str, str] = {}
    for _ in range(ROUNDS):
        try:
            settings = Settings.model_validate(given)
        except ValidationError as error:
            found = error.errors(include_url=False)
            nameless = {
                tuple(one["loc"][:-1]) for one in found if one["loc"][-1:] == ("[key]",) and one["type"] == "literal_error"
            }
            for one in found:
                loc = tuple(one["loc"])
                if loc[-1:] != ("[key]",) and any(loc[: len(name)] == name for name in nameless):
                    continue  # what stands under a wrong name is looked at when the name is right
                if named := OF_NOTHING.match(str(one["msg"])):
                    loc = tuple(named[1].split("."))
                if one["type"] != "missing" or not {loc, loc[:-1]} & emptied:
                    yield tuple(renamed.get(part, part) for part in loc if part != "[key]"), _plainly(loc, one)
                _take_out(given, loc, one, emptied, renamed)
            continue
        yield from _of_networks(settings)
        yield from _of_agents(settings)
        yield from _of_stores(settings.stores)
        return


def _of_networks(settings: Settings) -> Iterator[tuple[Loc, str]]:
    """Yield what is wrong with the networks that the lines ask for."""
    for name, line in settings.lines.items():
        for configuration in line.ladders():
            try:
                line.config(configuration)
            except ValidationError as error:
                for one in error.errors(include_url=False):
                    yield ("lines", name, *(one["loc"] or (str(one["type"]),))), _plainly((), one)


def _of_agents(settings: Settings) -> Iterator[tuple[Loc, str]]:
    """Yield the classes whose variants hold what their oldest agent does not know, so that a release would be refused."""
    for name, line in settings.lines.items():
        for kind, device_class in line.classes.items():
            oldest = device_class.oldest_agent
            if oldest is None or newest_form(oldest) >= SINCE_INTERVALS:
                continue
            told = f"ferry-agent {oldest} does not know"
            later = f"set oldest_agent to {minimum_agent(SINCE_INTERVALS)} when all devices have that version"
            if "turbo" in device_class.variants:
                rest = json.dumps([variant for variant in device_class.variants if variant != "turbo"])
                yield ("lines", name, "classes", kind, "variants"), f"{told} turbo; write variants = {rest}, or {later}"
            drawn = {variant: line.sampler_of(variant) for variant in device_class.variants}
            guided = [variant for variant, way in drawn.items() if (way.guidance_low, way.guidance_high) != (0, 1)]
            if guided:
                yield (
                    ("lines", name, "classes", kind, "variants"),
                    f"{told} the interval of guidance of {' and '.join(guided)}; remove guidance_low and guidance_high, or {later}",
                )


def _of_stores(stores: Stores) -> Iterator[tuple[Loc, str]]:
    """Yield the addresses that cannot be used, whatever they lead to; nothing is connected to."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    for name in ("database", "mlflow"):
        url = getattr(stores, name)
        if name == "mlflow" and url.startswith(("http://", "https://")):
            continue
        try:
            make_url(url).get_dialect()
        except (ArgumentError, NoSuchModuleError, ValueError):
            more = ", or the http(s) address of an MLflow server" if name == "mlflow" else ""
            yield (
                ("stores", name),
                f"it is no URL of a database; write one such as sqlite:///ferry.db or postgresql://HOST/NAME{more}",
            )
    scheme, apart, _ = stores.data.partition("://")
    if apart and scheme != "s3":
        yield ("stores", "data"), f"{scheme}:// is not supported; name a folder, or s3://BUCKET/PREFIX"


def _plainly(loc: Loc, error: Mapping[str, Any]) -> str:
    """Say in plain words what is wrong with a value."""
    kind, message, value = error["type"], str(error["msg"]).removeprefix("Value error, "), error.get("input")
    if kind == "missing":
        told = _field(loc)
        return f"it is missing{f': {told}' if told else ''}"
    if kind == "extra_forbidden":
        known = sorted(_keys(loc[:-1]))
        near = difflib.get_close_matches(str(loc[-1]), known, 1)
        return f"there is no such key; {f'did you mean {near[0]}?' if near else 'there are ' + ', '.join(known)}"
    if kind in ("dict_type", "model_type"):
        return "it must be a section, with a header in brackets"
    if OF_NOTHING.match(str(error["msg"])):
        return f"it {message.partition(' ')[2]}"
    if kind == "literal_error" and loc and loc[-1] == "[key]":
        known = re.findall(r"'([^']+)'", error["ctx"]["expected"])
        near = difflib.get_close_matches(str(value), known, 1)
        what = "configuration" if "II" in known else "variant"
        said = f"did you mean {near[0]}?" if near else f"choose {', '.join(known[:-1])} or {known[-1]}"
        return f"there is no {what} {shown(str(value))!r}; {said}"
    if kind == "too_short" and loc == ("lines",):
        return "there is no line; write one as [lines.NAME]"
    if kind in ("too_short", "string_too_short"):
        least, unit = error["ctx"]["min_length"], "entry" if kind == "too_short" else "character"
        return f"it must have at least {counted(least, unit)}"
    if message.startswith("Input should be") and isinstance(value, str | int | float | bool):
        return f"it is {shown(json.dumps(value, ensure_ascii=False))}, but must be{message.removeprefix('Input should be')}"
    if loc and loc[-1] == "[key]":
        return f"{shown(str(value))!r} is no name; use lower-case letters, digits and '-', at most 40"
    return message[:1].lower() + message[1:]


def _take_out(
    given: dict[str, Any], loc: Loc, error: Mapping[str, Any], emptied: set[Loc], renamed: dict[int | str, str]
) -> None:
    """Remove a mistake, so that the next round finds those behind it; what must be there gets a value that is right."""
    if not loc:  # a rule about several sections
        line = re.match(r"lines\.([a-z0-9-]+)\.data", str(error["msg"]).removeprefix("Value error, "))
        if line:
            given["lines"][line[1]]["data"] = f"data/{line[1]}"
        return
    *way, last = [part for part in loc if part != "[key]"]
    inside: Any = given
    for part in way:
        inside = inside.get(part) if isinstance(inside, dict) else None
    if not isinstance(inside, dict):
        _shorten(given, loc, emptied)
        return
    if loc[0] == "lines" and len(way) == 2 and last == "data":
        inside[last] = f"data/{way[1]}".lower()
    elif error["type"] == "successor":  # raised for a whole section, because of keys that it does not have any more
        for name in SUCCESSORS:
            inside[last].pop(name, None)
    elif error["type"] == "missing":
        if last == "lines":
            inside[last] = {"line": {"data": "data/line"}}
        else:
            _shorten(given, loc[:-1], emptied)
    elif loc[-1] == "[key]" and error["type"] == "literal_error":  # a new name would be wrong, too
        del inside[last]
    elif loc[-1] == "[key]":
        name = f"renamed-{len(renamed)}"
        inside[name], renamed[name] = inside.pop(last), str(last)
    elif isinstance(inside.get(last), dict) and inside[last] and len(loc) > 1:
        inside[last] = {"data": inside[last]["data"]} if len(loc) == 2 and "data" in inside[last] else {}
        emptied.add(loc)
    else:
        _shorten(given, loc, emptied)


def _shorten(given: dict[str, Any], loc: Loc, emptied: set[Loc]) -> None:
    """Remove what a location leads to, or, if it leads into a value, that value."""
    emptied.add(loc)
    inside: Any = given
    for i, part in enumerate(loc):
        if not isinstance(inside, dict) or part not in inside:
            return
        if i == len(loc) - 1 or not isinstance(inside[part], dict):
            if (loc[0], i) == ("lines", 0):
                inside[part] = {"line": {"data": "data/line"}}
            elif (loc[0], i) == ("lines", 1):
                inside[part] = {"data": f"data/{part}"}
            else:
                del inside[part]
            return
        inside = inside[part]


def _sections(annotation: Any) -> list[Any]:
    """Return what an annotation is made of: itself, or the parts of a union or of what is annotated."""
    if get_origin(annotation) in (dict, list):
        return [annotation]
    return [part for given in get_args(annotation) for part in _sections(given)] or [annotation]


def _model_at(loc: Loc) -> type[BaseModel] | None:
    """Return the section of ferry.toml at a location; None: there is a single value."""
    at: Any = Settings
    for part in loc:
        if isinstance(at, type) and issubclass(at, BaseModel):
            fields = {field.alias or name: field for name, field in at.model_fields.items()}
            if part not in fields:
                return None
            at = fields[str(part)].annotation
        elif get_origin(at) is dict:
            at = get_args(at)[1]
        if get_origin(at) is Annotated:
            at = get_args(at)[0]
        at = next((s for s in _sections(at) if get_origin(s) is dict or (isinstance(s, type) and issubclass(s, BaseModel))), None)
    return at if isinstance(at, type) and issubclass(at, BaseModel) else None


def _keys(loc: Loc) -> list[str]:
    model = _model_at(loc)
    return [field.alias or name for name, field in model.model_fields.items()] if model else []


def _field(loc: Loc) -> str:
    """Return the description of a key; empty: it has none."""
    model = _model_at(loc[:-1])
    fields = {field.alias or name: field for name, field in model.model_fields.items()} if model else {}
    return (fields[str(loc[-1])].description or "") if loc and str(loc[-1]) in fields else ""


def line_of(text: str, loc: Loc) -> int | None:
    """Find the line of a key, or else that of the nearest section around it; None: neither is written there."""
    wanted = [str(part) for part in loc]
    section: list[str] = []
    best: tuple[int, int] | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        if header := HEADER.match(line):
            section, here = _parts(header[1]), _parts(header[1])
        elif key := KEY.match(line):
            here = [*section, *_parts(key[1])]
        else:
            continue
        shared = min(len(here), len(wanted))  # a dotted key may lead on from what is wanted
        if shared and here[:shared] == wanted[:shared] and (best is None or shared > best[0]):
            best = (shared, number)
    return best[1] if best else None


def _parts(dotted: str) -> list[str]:
    return [part.strip().strip("\"'") for part in dotted.split(".")]
