"""What all commands of `ferry` share: common options, the printed answer, and one sentence for each error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from flows.errors import BusyError, FlowError, ServerError, VariantError
from flows.secrets import hidden, without_secrets
from model.errors import ModelError
from ota.errors import ForetoldError, LeftBehindError, OtaError, TransferError, printable
from registry.errors import LedgerError, PromotionError, RegistryError, SealError, StoreError

if TYPE_CHECKING:
    from flows.workspace import Workspace
    from registry.catalog import Subject

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


class Options:
    """Options that were given before the command."""

    workspace = Path()
    debug = False
    quiet = False


def open_workspace() -> Workspace:
    """Open the workspace that --workspace names; by default, the present folder."""
    from flows.workspace import Workspace

    return Workspace(Options.workspace)


class Commands(TyperGroup):
    """The command `ferry`, which says what is wrong with an argument in its own words; typer quotes pydantic."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # before the command itself began
            fail("interrupted; repeat the command to go on", 130)
        except typer.BadParameter as error:
            from pydantic import BaseModel, ValidationError

            from ota.wording import first_fault

            if isinstance(error.__cause__, ValidationError):
                error.message = first_fault(error.__cause__, BaseModel)
            raise


def subject_in(workspace: Workspace, text: str) -> Subject:
    """Parse LINE/CONFIG/VARIANT, and check that ferry.toml has the line.

    Raises:
        CatalogError: the text does not have that form.
        WorkspaceError: there is no such line.
    """
    from registry.catalog import Subject

    chosen = Subject.parse(text)
    workspace.line(chosen.line)
    return chosen


@contextmanager
def showing_progress() -> Iterator[None]:
    """Show progress bars in the block, unless --quiet."""
    if Options.quiet:
        yield
        return
    from flows.cli.progress import bars

    with bars():
        yield


def time_of(low: int, high: int) -> Callable[[object], int]:
    """Return the parser of an option that is a time, such as 2h, 3d or a number of seconds, within limits in seconds."""

    def seconds(given: object) -> int:
        from ota import durations

        try:
            value = durations.parse(str(given))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        if not low <= value <= high:
            raise typer.BadParameter(
                f"{printable(str(given))} is not between {durations.spoken(low)} and {durations.spoken(high)}"
            )
        return value

    return seconds


def moment_of(given: object) -> int:
    """Parse an option that is a moment: a date and time in UTC, such as 2026-12-02T18:00, or a time from now, such as 2h."""
    from datetime import UTC, datetime

    from ota import durations

    text, now = str(given), datetime.now(UTC)
    try:
        if text[:4].isdigit() and text[4:5] == "-":
            found = datetime.fromisoformat(text)
            return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp())
        return int(now.timestamp()) + durations.parse(text)
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter(
            f"{printable(text, 60)} is no moment; write it as 2026-12-02T18:00, which is UTC, or as a time from now, such as 2h"
        ) from error


def phase(sentence: str) -> None:
    """Say on stderr what takes a while now, before progress can be shown; not with --quiet."""
    if not Options.quiet:
        typer.echo(f"  {sentence}", err=True)


def answer(as_json: bool, value: dict[str, Any], text: str) -> None:
    """Print a command's answer as one JSON object, or as text."""
    typer.echo(json.dumps(without_secrets(value)) if as_json else hidden(printable(text, limit=len(text), keep="\n")))


@contextmanager
def reported_errors(after_interrupt: str = "repeat the command to go on") -> Iterator[None]:
    """Turn expected errors into one sentence and an exit code; others are faults of ferry and keep their traceback.

    Args:
        after_interrupt: what to do after Ctrl-C.
    """
    try:
        yield
    except (FlowError, ModelError, RegistryError, OtaError) as error:
        if Options.debug:
            raise
        fail(str(error), _exit_code(error))
    except OSError as error:
        if Options.debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}; check the path and who may write there", 3)
    except Exception as error:
        if _is_interrupt(error):
            fail(f"interrupted; {after_interrupt}", 130)
        server = f"Prefect's server at {os.environ.get('PREFECT_API_URL')}"
        if not Options.debug and _is_refused(error):
            fail(
                f"{server} refuses access; set PREFECT_API_AUTH_STRING (that of `ferry serve` is in work/prefect/credentials)", 4
            )
        if Options.debug or not _is_unreachable(error):
            raise
        fail(f"{server} cannot be reached; start it, or unset PREFECT_API_URL", 4)
    except KeyboardInterrupt:
        fail(f"interrupted; {after_interrupt}", 130)


def _is_interrupt(error: BaseException | None) -> bool:
    """Check whether an error is Ctrl-C in the form that a library gave it, such as pydantic while it serializes a value."""
    while error:
        of_pydantic = type(error).__module__.startswith("pydantic_core") and "KeyboardInterrupt" in str(error)
        if isinstance(error, KeyboardInterrupt) or of_pydantic:
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_refused(error: Exception) -> bool:
    """Check whether Prefect's server refused the credentials."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return type(error).__module__.startswith(("httpx", "prefect")) and status in (401, 403)


def _is_unreachable(error: Exception) -> bool:
    """Check whether Prefect's client did not reach its server; then it raises a bare RuntimeError, or an error of httpx."""
    return "Failed to reach API" in str(error) or type(error).__module__.startswith(("httpx", "httpcore"))


def _exit_code(error: BaseException) -> int:
    if isinstance(error, VariantError) and error.__cause__:
        return _exit_code(error.__cause__)
    if isinstance(error, (PromotionError, ForetoldError, LeftBehindError)):
        return 5
    if isinstance(error, (LedgerError, SealError)):
        return 6
    if isinstance(error, (StoreError, TransferError, ServerError, BusyError)):
        return 4
    return 3 if isinstance(error, (FlowError, ModelError, RegistryError, OtaError, OSError)) else 1


def fail(message: str, code: int) -> NoReturn:
    """Say what went wrong in one line, and end with a code."""
    typer.echo(
        f"ferry: {hidden(printable(message))}", err=True
    )  # it may quote untrusted text: a tag in MLflow, a device's report
    raise typer.Exit(code)
