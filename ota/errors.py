"""What can go wrong on the way to a device, split by who is at fault.

    OtaError
    ├── RepositoryError      what the factory published is wrong, and nothing of it is used
    │   ├── TrustError       a signature, version or expiry does not hold
    │   │   ├── ExpiredError what was signed is too old to act on
    │   │   └── InvalidError what was signed is nonsense: a hash that is none, a number out of range
    │   ├── ManifestError    a manifest, policy or table that does not say what it must
    │   │   └── AgentError   a document for a newer agent than this
    │   └── DeltaError       a delta that is damaged, foreign, or over a limit
    ├── TransferError        the link or the server failed; trying again later is right
    ├── DeviceError          this device cannot do it
    │   ├── RoomError        not enough disk or memory
    │   │   └── SoftwareError a package that the agent needs is missing, broken or of another version
    │   ├── UnfinishedError  a child process was killed, or ran out of time or memory; that proves nothing yet
    │   │   └── LateError    it did not end in time
    │   ├── DiedError        a child process died and gave no answer: its bundle's fault, or the software's
    │   ├── StateError       the state directory is missing or foreign
    │   │   └── BusyError    another agent holds it
    │   └── BaseError        a bundle on disk is not the one that was installed
    ├── GateError            the new bundle was tried on this device and refused
    ├── OperatorError        a key, store or name handed in on the factory's side does not fit
    └── FaultError           something that nobody foresaw; what runs is kept, and the next try begins anew

`TrustError` and `GateError` are final for a release; `TransferError` is not. Each message is one sentence that says what
to do next. Nothing foreign crosses the package's boundary: errors of python-tuf, urllib3, zstd, bsdiff4, ONNX
Runtime and the operating system arrive as one of these, with the original as `__cause__`. A message may quote what a
stranger wrote, so each is made `printable` where it is made: it reaches terminals, logs and reports as one line.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

MAX_MESSAGE = 2000  # characters of an error


def printable(text: str, limit: int = MAX_MESSAGE, keep: str = "") -> str:
    r"""Show a text that may come from a stranger as one harmless line.

    Control characters could rewrite a terminal or forge a line of a log, lone surrogates cannot be written at all, and
    characters that turn the direction of reading show one name as another: all are written as escapes, such as `\x1b`.

    Args:
        text: of any content and length.
        limit: characters that are shown; what follows is counted.
        keep: characters to leave as they are all the same.
    """
    shown = "".join(c if c in keep or c == " " or c.isprintable() else ascii(c)[1:-1] for c in text[:limit])
    return shown + (f"… ({len(text) - limit:,} more characters)" if len(text) > limit else "")


class OtaError(Exception):
    """Base of everything that `ota` raises on purpose."""

    def __init__(self, message: str = "") -> None:
        """Take one sentence that says what is wrong and what to do next; it is made printable."""
        super().__init__(printable(message))


class RepositoryError(OtaError):
    """What was published is wrong."""


class TrustError(RepositoryError):
    """Metadata that is not signed, too old, expired, or rolled back."""


class ExpiredError(TrustError):
    """Metadata whose signature has ended: perhaps nobody renewed it, perhaps an old copy is served."""


class InvalidError(TrustError):
    """Signed facts of a target that are not what they must be: its key is in wrong hands, or its tool is faulty."""


class ManifestError(RepositoryError):
    """A signed document that does not have the form or the content it must have."""


class AgentError(ManifestError):
    """A document made for a newer agent: this one cannot read it, and nothing is wrong with it."""


class DeltaError(RepositoryError):
    """A delta that cannot be applied: damaged, for another base, of an unknown version, or over a limit."""


class TransferError(OtaError):
    """The repository could not be reached, or broke off."""


class DeviceError(OtaError):
    """This device cannot carry the update out."""


class RoomError(DeviceError):
    """Not enough room on the disk, or memory to start a process."""


class SoftwareError(RoomError):
    """The agent's own software cannot be loaded, does not compute, or is not of the version asked for: no bundle is to blame."""


class UnfinishedError(DeviceError):
    """A child process was killed, or ran out of time or memory: it may go better next time, so tries are counted."""


class LateError(UnfinishedError):
    """A child process did not end in time and was stopped."""


class DiedError(DeviceError):
    """A child process died and gave no answer."""


class StateError(DeviceError):
    """The agent's state directory is missing, damaged, or not to be read."""


class BusyError(StateError):
    """Another agent is at work in the state directory."""


class BaseError(DeviceError):
    """A file of an installed bundle is missing, or does not have the hash it was installed with."""


class GateError(OtaError):
    """The device tried the new bundle and refused it."""


class OperatorError(OtaError):
    """Something handed in on the factory's side is wrong: a key, a store, a name, a version."""


class FaultError(OtaError):
    """A fault of ours: something failed in a way that nobody foresaw."""


@contextmanager
def own_errors() -> Iterator[None]:
    """Let nothing but our own errors out of the block: whatever a stranger sends, the agent goes on with what it has.

    Raises:
        StateError: the system refused.
        FaultError: something else failed that nobody foresaw.
    """
    try:
        yield
    except OSError as error:
        raise StateError(f"the system refused: {error}; check the directory's owner and the disk") from error
    except Exception as error:
        if isinstance(error, OtaError):
            raise
        what = f"{type(error).__name__}: {error}"
        raise FaultError(f"the agent failed in a way that nobody foresaw ({what}); what runs is kept, report it") from error
