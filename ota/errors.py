"""Errors of updates, split by who is at fault.

    OtaError
    ├── RepositoryError      what the factory published is wrong; nothing of it is used
    │   ├── TrustError       a signature, version or expiry is not valid
    │   │   ├── ExpiredError signed metadata have expired
    │   │   └── InvalidError a signed value is malformed, such as a hash, or out of range
    │   ├── ManifestError    a manifest, policy or table does not have the required form or content
    │   │   └── AgentError   a document needs a newer agent
    │   └── DeltaError       a delta is damaged, for another base, or over a limit
    ├── TransferError        the link or the server failed; try again later
    ├── DeviceError          this device cannot carry out the update
    │   ├── RoomError        not enough disk space or memory
    │   │   └── SoftwareError a package that the agent needs is missing, broken or of another version
    │   ├── UnfinishedError  a child process was killed, or ran out of time or memory; this proves nothing yet
    │   │   └── LateError    the child process did not end in time
    │   ├── DiedError        a child process died without an answer: the bundle or the software is at fault
    │   ├── StateError       the state directory is missing, damaged or cannot be read
    │   │   └── BusyError    another agent uses the state directory
    │   └── BaseError        a file of an installed bundle is missing or was changed
    ├── GateError            this device tried the new bundle and refused it
    ├── ForetoldError        fielded devices would refuse a new bundle; nothing was signed
    ├── LeftBehindError      agents of fielded devices are too old for a new bundle; nothing was signed
    ├── OperatorError        a key, store or name given on the factory's side is wrong
    │   └── EnrolmentError   a device shows a token that is wrong, expired or bound to another device, or lacks the key
    │       ├── TakenError   the token was used before, or the id is enrolled
    │       └── AttemptsError the token was tried too often with wrong data
    └── FaultError           an unforeseen error; the running bundle is kept, and the next try starts again

`TrustError` and `GateError` are final for a release; `TransferError` is not. Each message is one sentence that says what
to do next. The package raises no other errors: those of python-tuf, urllib3, zstd, bsdiff4, ONNX Runtime and the
operating system are turned into one of these, with the original as `__cause__`. A message may quote text from outside,
so it is made `printable` when the error is made: it reaches terminals, logs and reports as one line.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

MAX_MESSAGE = 2000  # characters of an error
EXIT_CODES: dict[str, dict[int, str]] = {
    "ferry": {
        0: "success, or nothing to do",
        1: "internal error",
        2: "wrong usage",
        3: "invalid input (workspace, data, name, key)",
        4: "a store or server is not available, try later",
        5: "the gate did not pass a version, or devices would refuse a release or be left behind",
        6: "a record was changed afterwards",
        7: "a signature is past half of its lifetime (`trust status --check`)",
        130: "interrupted",
    },
    "ferry-agent": {
        0: "success, or nothing to do",
        1: "internal error",
        2: "wrong usage",
        3: "this device cannot do it (disk, state, software, name)",
        4: "the repository or the folder of reports cannot be reached, try later",
        5: "the published update failed verification; nothing was installed",
        6: "the new bundle failed its trial on this device and was refused",
        7: "what is published needs a newer agent; what runs is kept",
        130: "interrupted",
    },
    "ferry-delta": {
        0: "success",
        1: "internal error",
        2: "wrong usage",
        3: "invalid input, or a file that cannot be read or written",
        130: "interrupted",
    },
}
"""Exit codes by program, with their meanings. The programs' help and the documentation show them."""


def exit_codes(program: str) -> str:
    """Return the exit codes of a program and their meanings as one line, for its help."""
    return f"Exit codes: {' · '.join(f'{code} {meaning}' for code, meaning in EXIT_CODES[program].items())}."


def printable(text: str, limit: int = MAX_MESSAGE, keep: str = "") -> str:
    r"""Return a text that may come from outside as one harmless line.

    Control characters could rewrite a terminal or forge a line of a log, lone surrogates cannot be written at all, and
    characters that change the reading direction make one name look like another. All are written as escapes, such as `\x1b`.

    Args:
        text: text of any content and length.
        limit: number of characters that are shown; the rest is only counted.
        keep: characters that are left as they are.
    """
    shown = "".join(c if c in keep or c == " " or c.isprintable() else ascii(c)[1:-1] for c in text[:limit])
    return shown + (f"… ({len(text) - limit:,} more characters)" if len(text) > limit else "")


class OtaError(Exception):
    """Base class of all errors that `ota` raises on purpose."""

    def __init__(self, message: str = "") -> None:
        """Store one sentence that says what is wrong and what to do next, in printable form."""
        super().__init__(printable(message))


class RepositoryError(OtaError):
    """What the factory published is wrong."""


class TrustError(RepositoryError):
    """Metadata that is not signed, too old, expired, or rolled back."""


class ExpiredError(TrustError):
    """Metadata that have expired: perhaps nobody renewed them, perhaps a server delivers an old copy."""


class InvalidError(TrustError):
    """Signed values of a target that are not valid: the key is in the wrong hands, or the signing tool is faulty."""


class ManifestError(RepositoryError):
    """A signed document that does not have the required form or content."""


class AgentError(ManifestError):
    """A document for a newer agent: this agent cannot read it, but the document is not faulty."""


class DeltaError(RepositoryError):
    """A delta that cannot be applied: damaged, for another base, of an unknown version, or over a limit."""


class TransferError(OtaError):
    """The repository could not be reached, or the transfer broke off."""


class DeviceError(OtaError):
    """This device cannot carry out the update."""


class RoomError(DeviceError):
    """Not enough room on the disk, or not enough memory to start a process."""


class SoftwareError(RoomError):
    """The agent's own software cannot be loaded, does not compute, or has the wrong version: no bundle is to blame."""


class UnfinishedError(DeviceError):
    """A child process was killed, or ran out of time or memory: the next try may succeed, so tries are counted."""


class LateError(UnfinishedError):
    """A child process did not end in time and was stopped."""


class DiedError(DeviceError):
    """A child process died and gave no answer."""


class StateError(DeviceError):
    """The agent's state directory is missing, damaged, or cannot be read."""


class BusyError(StateError):
    """Another agent uses the state directory."""


class BaseError(DeviceError):
    """A file of an installed bundle is missing, or no longer has the hash with which it was installed."""


class GateError(OtaError):
    """The device tried the new bundle and refused it."""


class ForetoldError(OtaError):
    """Fielded devices would refuse a new bundle in its trial, so the factory does not sign it."""


class LeftBehindError(OtaError):
    """The agents of fielded devices are too old for a new bundle, and nobody decided to leave them behind."""


class OperatorError(OtaError):
    """Something given on the factory's side is wrong: a key, a store, a name, a version."""


class EnrolmentError(OperatorError):
    """A device cannot be enrolled: its token is wrong, expired or bound to another device, or it does not hold the key."""


class TakenError(EnrolmentError):
    """The token was used before, or the id is enrolled already."""


class AttemptsError(EnrolmentError):
    """The token was tried too often with wrong data."""


class FaultError(OtaError):
    """An error of the agent itself: something failed in a way that nobody foresaw."""


@contextmanager
def own_errors() -> Iterator[None]:
    """Turn every other error in the block into one of our own, so that the agent keeps running whatever it receives.

    Raises:
        StateError: the operating system refused a request.
        FaultError: something else failed in a way that nobody foresaw.
    """
    try:
        yield
    except OSError as error:
        raise StateError(f"the system refused: {error}; check the directory's owner and the disk") from error
    except Exception as error:
        if isinstance(error, OtaError):
            raise
        what = f"{type(error).__name__}: {error}"
        raise FaultError(f"the agent failed unexpectedly ({what}); the running model is kept; report this") from error
