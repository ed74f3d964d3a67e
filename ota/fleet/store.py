"""The fleet: keys of enrolled devices and their signed reports, in tables of their own in the workspace's database."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import ValidationError
from sqlalchemy import BigInteger, Column, Engine, Integer, MetaData, String, Table, create_engine, func, insert, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from ota.errors import ManifestError, OperatorError, TransferError, printable
from ota.manifest import NAME_PATTERN
from ota.report import MAX_REPORT, DeviceReport, open_line

_metadata = MetaData()
_devices = Table(
    "fleet_devices", _metadata,
    Column("device", String(40), primary_key=True),
    Column("public_key", String(64), nullable=False),
    Column("enrolled", BigInteger, nullable=False),
)  # fmt: skip
_reports = Table(
    "fleet_reports", _metadata,
    Column("device", String(40), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("received_at", BigInteger, nullable=False),
    Column("event", String(20), nullable=False),
    Column("manifest", String(64)),
    Column("body", String(MAX_REPORT), nullable=False),
)  # fmt: skip


@dataclass(frozen=True)
class Heard:
    """The last report of a device."""

    report: DeviceReport
    at: int
    """When the factory received it, in seconds since 1970 by the factory's clock; a device's clock may be wrong."""


@dataclass(frozen=True)
class Collected:
    """The result of reading an inbox."""

    accepted: list[DeviceReport]
    rejected: dict[str, str]
    """File name → reason."""


class Fleet:
    """Devices and their reports."""

    def __init__(self, database: str) -> None:
        """Open the tables in the database of a SQLAlchemy URL, and create those that are missing.

        Raises:
            TransferError: the database cannot be opened.
        """
        with _foreign_errors():
            self._engine: Engine = create_engine(database)
            _metadata.create_all(self._engine)

    def close(self) -> None:
        """Close the database connections."""
        self._engine.dispose()

    def enroll(self, device: str, public_key: str) -> None:
        """Enrol a device, so that reports which it signs with this key are accepted; the same key again changes nothing.

        Args:
            device: its id.
            public_key: 64 hex digits of its Ed25519 key, as `ferry-agent init` prints it.

        Raises:
            OperatorError: the id or key is malformed, or the device is enrolled with another key.
        """
        if not NAME_PATTERN.fullmatch(device):
            raise OperatorError(f"{device!r} is not a device id; use lower-case letters, digits and '-', at most 40")
        try:
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
        except ValueError:
            raise OperatorError("the public key must be 64 hex digits; copy it from `ferry-agent init`") from None
        with _foreign_errors(), self._engine.begin() as connection:
            known = connection.execute(select(_devices.c.public_key).where(_devices.c.device == device)).scalar()
            if known is None:
                connection.execute(insert(_devices).values(device=device, public_key=public_key, enrolled=int(time.time())))
            elif known != public_key:
                raise OperatorError(f"{device} is enrolled with another key; give the replaced device a new id")

    def receive(self, data: bytes) -> DeviceReport:
        """Check one signed report and keep it; a copy of a kept report is accepted and changes nothing.

        Raises:
            ManifestError: it is malformed, no enrolled device signed it, another report has its number, or it arrives twice at
                once.
        """
        opened = open_line(data)
        report = opened.report
        with _foreign_errors(), self._engine.begin() as connection:
            key = connection.execute(select(_devices.c.public_key).where(_devices.c.device == report.device)).scalar()
            if key is None:
                raise ManifestError(f"{report.device} is not enrolled; run `ferry fleet enroll {report.device} KEY`")
            if not opened.is_signed_by(key):
                raise ManifestError(f"the report is not signed by {report.device}'s key")
            body = report.canonical().decode()
            kept = connection.execute(
                select(_reports.c.body).where(_reports.c.device == report.device, _reports.c.number == report.number)
            ).scalar()
            if kept is not None and DeviceReport.model_validate_json(kept) == report:
                return report
            if kept is not None:
                raise ManifestError(f"{report.device} has already sent another report number {report.number}")
            try:
                connection.execute(
                    insert(_reports).values(
                        device=report.device,
                        number=report.number,
                        received_at=int(time.time()),
                        event=report.event,
                        manifest=report.manifest,
                        body=body,
                    )
                )
            except IntegrityError as error:
                raise ManifestError(f"report {report.number} of {report.device} arrived twice at once") from error
        return report

    def collect(self, inbox: Path) -> Collected:
        """Receive every report file of a folder; remove the accepted files, and move the rejected ones to `rejected/`.

        A file that cannot be read or removed is listed as rejected and stays. It does not stop the others from being received.
        """
        accepted, rejected = [], {}
        for path in sorted(inbox.glob("*.json")):
            shown = printable(path.name)
            try:
                accepted.append(self.receive(_read(path)))
                path.unlink()
            except ManifestError as error:
                rejected[shown] = str(error)
                _set_aside(path)
            except OSError as error:
                rejected[shown] = f"cannot be read and removed: {error.strerror}; it is left for the next time"
        return Collected(accepted, rejected)

    def reports(self, device: str | None = None) -> list[DeviceReport]:
        """Return the kept reports of one device, or of all, by device and number."""
        query = select(_reports.c.body).order_by(_reports.c.device, _reports.c.number)
        if device:
            query = query.where(_reports.c.device == device)
        with _foreign_errors(), self._engine.connect() as connection:
            return [DeviceReport.model_validate_json(body) for body in connection.execute(query).scalars()]

    def devices(self) -> dict[str, DeviceReport | None]:
        """Return every enrolled device with its last report; None: it has not reported."""
        with _foreign_errors(), self._engine.connect() as connection:
            names = connection.execute(select(_devices.c.device).order_by(_devices.c.device)).scalars().all()
            for name in names:
                if not NAME_PATTERN.fullmatch(name):  # a terminal shows it, and NULL would select all reports
                    raise ValueError(name)
        return {name: next(reversed(self.reports(name)), None) for name in names}

    def heard(self) -> dict[str, Heard | None]:
        """Return every enrolled device with its last report and when it came; None: it has not reported.

        It reads one report of each device, however many are kept.
        """
        last = select(_reports.c.device, func.max(_reports.c.number).label("number")).group_by(_reports.c.device).subquery()
        query = select(_devices.c.device, _reports.c.received_at, _reports.c.body).select_from(
            _devices.outerjoin(last, _devices.c.device == last.c.device).outerjoin(
                _reports, (_reports.c.device == last.c.device) & (_reports.c.number == last.c.number)
            )
        )
        found: dict[str, Heard | None] = {}
        with _foreign_errors(), self._engine.connect() as connection:
            for name, at, body in connection.execute(query.order_by(_devices.c.device)):
                if not NAME_PATTERN.fullmatch(name):  # a terminal shows it
                    raise ValueError(name)
                found[name] = None if body is None else Heard(DeviceReport.model_validate_json(body), int(at))
        return found


def _read(path: Path) -> bytes:
    """Read a file that others left; a link is not followed, and a pipe is not waited for.

    Raises:
        ManifestError: it is no regular file, or too large.
        OSError: it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a socket
            raise ManifestError("is not a regular file") from error
        raise
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ManifestError("is not a regular file")
        if found.st_size > MAX_REPORT:
            raise ManifestError(f"is larger than {MAX_REPORT} bytes")
        return file.read(MAX_REPORT + 1)


def _set_aside(path: Path) -> None:
    """Move a file to `rejected/`, unless that is a link, which could make the file appear in any other folder."""
    with suppress(OSError):  # then the next call rejects it again
        place = path.parent / "rejected"
        with suppress(FileExistsError):
            place.mkdir()
        folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.replace(path, path.name, dst_dir_fd=folder)
        finally:
            os.close(folder)


@contextmanager
def _foreign_errors() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise TransferError(
            f"the database's driver {error.name} is not installed; `pip install 'deltaferry[postgres]'`"
        ) from error
    except SQLAlchemyError as error:
        raise TransferError(f"the database cannot be used: {str(error).splitlines()[0]}; check its URL in ferry.toml") from error
    except ValidationError as error:
        raise OperatorError("the fleet's tables hold a report of another version; migrate the database") from error
    except (ValueError, TypeError) as error:
        raise OperatorError(
            "the fleet's tables hold data that ferry did not write; check who may write to the database, and restore it"
        ) from error
