"""What devices told: their signed reports verbatim, and the last state of each, in the tables of the workspace's database."""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

from sqlalchemy import Connection, Row, Select, and_, bindparam, func, insert, or_, select, tuple_, update

from ota.errors import ManifestError, OperatorError, printable
from ota.fleet.register import Register
from ota.fleet.schema import archived, changes, devices, foreign_errors, keys, last, reading, reports, writing
from ota.manifest import NAME_PATTERN
from ota.report import MAX_REPORT, DeviceReport, Opened, open_line

PAGE: Final = 1000  # rows that are read at once
AT_ONCE: Final = 100  # files of an inbox that are kept in one transaction
NEVER_SET: Final = 1_577_836_800  # 2020-01-01: an earlier time is that of a clock that nobody set
Proof = Literal["verified", "unverifiable", "forged"]
"""Whether a kept report can be shown to come from its device.

unverifiable: version 0.2 kept it without its signature. forged: its row was changed, or another key signed it.
"""


@dataclass(frozen=True)
class Arrived:
    """A report whose signature was verified."""

    opened: Opened
    key: str
    """Public key that verified it, as 64 hex digits."""


@dataclass(frozen=True)
class Verdict:
    """What became of a report."""

    device: str
    number: int
    code: str
    """Empty: it is kept, durably, now or since before. Otherwise one of `ota.report.Refusal`, or unenrolled."""
    reason: str
    highest: int
    """Highest number that is kept of this device; 0: none."""


@dataclass(frozen=True)
class Heard:
    """The last report of a device."""

    report: DeviceReport
    at: int
    """When the factory received it, in seconds since 1970 by the factory's clock; a device's clock may be wrong."""


@dataclass(frozen=True)
class Checked:
    """A kept report, and whether its signature was verified again."""

    report: DeviceReport
    at: int
    """When the factory received it, in seconds since 1970 by the factory's clock."""
    proof: Proof


@dataclass(frozen=True)
class LastState:
    """A device of the register with what was last heard of it; times are seconds since 1970 by the factory's clock."""

    device: str
    enrolled_line: str | None
    enrolled_class: str | None
    confirmed: int | None
    retired: int | None
    own_tags: str
    """JSON: tags that an operator gave."""
    number: int | None
    """Of the last report; None: it never reported."""
    received_at: int | None
    heard_at: int | None
    """When anything came from it, also a report that was kept before."""
    heartbeat_at: int | None
    line: str | None
    device_class: str | None
    active: str | None
    agent: str | None
    event: str | None
    """Of the last report that is no heartbeat."""
    reason: str | None
    told_tags: str | None
    """JSON: tags that the device's owner gave, of the last heartbeat."""
    skew: int | None
    """Seconds by which its clock is ahead of the factory's."""
    conflicts: int
    """Reports with a number that another report has."""
    conflict_at: int | None
    refused: int
    refused_at: int | None
    refused_why: str | None

    @property
    def tags(self) -> dict[str, str]:
        """Tags by name; those of an operator win over those that the device tells."""
        return dict(_tags(self.told_tags or "[]", self.own_tags))


@dataclass(frozen=True)
class Collected:
    """The result of reading an inbox."""

    accepted: list[DeviceReport]
    rejected: dict[str, str]
    """File name → reason."""


class Fleet(Register):
    """Devices and their reports."""

    # Reports that come in

    def keep(
        self,
        arrived: Sequence[Arrived],
        *,
        now: int | None = None,
        live: bool = True,
        refused: Mapping[str, int] | None = None,
    ) -> list[Verdict]:
        """Keep reports in one transaction; they are durable when this returns. One bad report does not spoil the others.

        Args:
            arrived: reports whose signatures the caller has verified. It is checked again, within the transaction, that the device is
                in use and still has that key.
            now: seconds since 1970; None: by the clock.
            live: whether the devices send them now, so that the newest one tells how wrong a device's clock is; reports of a folder may
                have waited for days.
            refused: reports that the caller has refused, by device, to be counted.

        Returns:
            A verdict for each report, in order.

        Raises:
            TransferError: the database is full or cannot be used; then nothing was kept.
        """
        now = int(time.time()) if now is None else now
        refused = refused or {}
        names = {a.opened.report.device for a in arrived} | refused.keys()
        if not names:
            return []
        with writing(self.engine) as connection:
            batch = _Batch(connection, arrived, names, now, live)
            verdicts = [batch.decide(a) for a in arrived]
            batch.write(refused)
        return [Verdict(*verdict, highest=batch.highest(verdict[0])) for verdict in verdicts]

    def receive(self, data: bytes) -> DeviceReport:
        """Check one signed report and keep it; a copy of a kept report is accepted and changes nothing.

        Raises:
            ManifestError: it is malformed, no enrolled device signed it, the device is retired or of another line or class, or another
                report has its number.
        """
        (result,) = self.take([data])
        if isinstance(result, ManifestError):
            raise result
        return result

    def take(self, lines: Sequence[bytes], *, live: bool = False) -> list[DeviceReport | ManifestError]:
        """Verify and keep reports in one transaction, and return each or why it is refused; `live` is that of `keep`.

        Raises:
            TransferError: the database is full or cannot be used; then nothing was kept.
        """
        results: list[DeviceReport | ManifestError] = []
        opened: dict[int, Opened] = {}
        for place, line in enumerate(lines):
            try:
                opened[place] = open_line(line)
                results.append(opened[place].report)
            except ManifestError as error:
                results.append(error)
        held = self._keys_of({o.report.device for o in opened.values()})
        arrived: dict[int, Arrived] = {}
        wrong: Counter[str] = Counter()
        for place, one in opened.items():
            device = one.report.device
            if device not in held:
                results[place] = ManifestError(f"{device} is not enrolled; run `ferry fleet enroll {device} KEY`")
            elif not one.is_signed_by(held[device]):
                results[place] = ManifestError(f"the report is not signed by {device}'s key")
                wrong[device] += 1
            else:
                arrived[place] = Arrived(one, held[device])
        verdicts = self.keep(list(arrived.values()), live=live, refused=wrong)
        for place, verdict in zip(arrived, verdicts, strict=True):
            if verdict.code:
                results[place] = ManifestError(verdict.reason)
        return results

    def _keys_of(self, names: set[str]) -> dict[str, str]:
        query = select(devices.c.device, devices.c.public_key).where(devices.c.device.in_(names))
        with reading(self.engine) as connection:
            return {row.device: str(row.public_key) for row in connection.execute(query).all()}

    def collect(self, inbox: Path) -> Collected:
        """Receive every report file of a folder; remove the accepted files, and move the rejected ones to `rejected/`.

        A file that cannot be read or removed is listed as rejected and stays. It does not stop the others from being received.
        """
        accepted, rejected = [], {}
        paths = sorted(inbox.glob("*.json"))
        for first in range(0, len(paths), AT_ONCE):
            read: dict[Path, bytes] = {}
            for path in paths[first : first + AT_ONCE]:
                try:
                    read[path] = _read(path)
                except ManifestError as error:
                    rejected[printable(path.name)] = str(error)
                    _set_aside(path)
                except OSError as error:
                    rejected[printable(path.name)] = _left(error)
            for path, result in zip(read, self.take(list(read.values())), strict=True):
                if isinstance(result, ManifestError):
                    rejected[printable(path.name)] = str(result)
                    _set_aside(path)
                    continue
                try:
                    path.unlink()
                    accepted.append(result)
                except OSError as error:
                    rejected[printable(path.name)] = _left(error)
        return Collected(accepted, rejected)

    # What was heard

    def states(self, device: str = "", after: str = "", limit: int = 0) -> list[LastState]:
        """Return the devices of the register with what was last heard of them, by id; retired and unconfirmed ones included.

        Args:
            device: the only one that is returned, if it is there.
            after: only ids that come after this one.
            limit: how many at most; 0: all.
        """
        query = _STATES.where(devices.c.device == device) if device else _STATES
        query = query.where(devices.c.device > after) if after else query
        with reading(self.engine) as connection:
            return [_state(row) for row in connection.execute(query.limit(limit) if limit else query).all()]

    def running(self) -> dict[str, int]:
        """Return how many devices that count run each bundle, by the hash of its manifest, as they said last."""
        query = _COUNTING.with_only_columns(last.c.active, func.count()).where(last.c.active.is_not(None)).group_by(last.c.active)
        with reading(self.engine) as connection:
            return {str(active): int(count) for active, count in connection.execute(query.order_by(None))}

    def probe(self) -> None:
        """Commit a change that changes nothing, to see whether the database takes reports.

        Raises:
            TransferError: it does not.
        """
        with writing(self.engine) as connection:
            connection.execute(update(changes).values(number=changes.c.number))

    def heard(self) -> dict[str, Heard | None]:
        """Return every device that counts with its last report and when it came; None: it has not reported.

        Confirmed devices count that are not retired. One row of each device is read, however many reports are kept.
        """
        query = _COUNTING.with_only_columns(devices.c.device, last.c.received_at, last.c.report)
        found: dict[str, Heard | None] = {}
        with reading(self.engine) as connection:
            for name, at, body in connection.execute(query).all():
                if not NAME_PATTERN.fullmatch(name):  # a terminal shows it
                    raise ValueError(name)
                found[name] = None if body is None else Heard(DeviceReport.model_validate_json(body), int(at))
        return found

    def devices(self) -> dict[str, DeviceReport | None]:
        """Return every device that counts with its last report, as `heard` does; None: it has not reported."""
        return {name: known.report if known else None for name, known in self.heard().items()}

    def reports(self, device: str | None = None) -> list[DeviceReport]:
        """Return the kept reports of one device, or of all, by device and number."""
        return [checked.report for checked in self._rows(_of(device), verify=False)]

    def timed(self, manifest: str) -> dict[str, int]:
        """Return the milliseconds of an image by device, of each device's last report about a bundle that tells them."""
        query = _REPORTS.where(reports.c.manifest == manifest, reports.c.event != "alive")
        rows = self._rows(query, verify=False)
        return {row.report.device: row.report.milliseconds for row in rows if row.report.milliseconds}

    def verified(self, device: str | None = None, manifest: str | None = None, since: int = 0) -> Iterator[Checked]:
        """Yield kept reports by device and number, each with its signature verified again.

        Whoever can write to the database can change a row, but not sign one. A key counts until it is replaced.

        Args:
            device: whose reports; None: all.
            manifest: hash of the bundle that they are about; None: any.
            since: when they came at the earliest, in seconds since 1970 by the factory's clock.
        """
        query = _of(device).where(reports.c.received_at >= since)
        yield from self._rows(query if manifest is None else query.where(reports.c.manifest == manifest), verify=True)

    def deciding(self) -> dict[str, Checked | None]:
        """Return every device that counts with its last report, whose signature was verified again; None: it has not reported.

        The last state and its report are read as one row, so a report that comes meanwhile is seen whole or not at all.

        Raises:
            OperatorError: a last report was changed or removed in the database.
        """
        found: dict[str, Checked | None] = {}
        after, more = "", True
        while more:
            with reading(self.engine) as connection:
                rows = connection.execute(_DECIDING.where(devices.c.device > after).limit(PAGE)).all()
                history = _History(connection, [row.name for row in rows])
            with foreign_errors():
                found.update((row.name, _decisive(row, history)) for row in rows)
            more = len(rows) == PAGE
            after = rows[-1].name if more else after
        return found

    def _rows(self, query: Select[Any], verify: bool) -> Iterator[Checked]:
        """Yield the reports of a query; a thousand rows are read at a time, so that no writer waits for whoever takes them."""
        query = query.order_by(reports.c.device, reports.c.number).limit(PAGE)
        page = query
        while True:
            with reading(self.engine) as connection:
                rows = connection.execute(page).all()
                held = _History(connection, {row.device for row in rows}) if verify else None
            for row in rows:
                with foreign_errors():
                    checked = _checked(row, held)
                yield checked
            if len(rows) < PAGE:
                return
            device, number = rows[-1].device, rows[-1].number
            page = query.where(or_(reports.c.device > device, and_(reports.c.device == device, reports.c.number > number)))


def _checked(row: Row[Any], held: _History | None) -> Checked:
    """Parse the report of a row, and verify it if keys are given.

    Raises:
        ValueError: somebody else wrote the row.
    """
    if row.envelope is None:
        return Checked(DeviceReport.model_validate_json(row.body), row.received_at, "unverifiable")
    try:
        opened = open_line(row.envelope.encode())
    except ManifestError as error:
        raise ValueError(row.device) from error
    told = opened.report
    whole = (told.device, told.number, told.event, told.manifest) == (row.device, row.number, row.event, row.manifest)
    genuine = held is None or (whole and held.signed(opened, row.received_at))
    return Checked(told, row.received_at, "verified" if genuine else "forged")


def _decisive(row: Row[Any], held: _History) -> Checked | None:
    """Verify the last report of a device, in a row of `_DECIDING`; None: it has not reported.

    Raises:
        OperatorError: the report was changed or removed in the database.
        ValueError: somebody else wrote the row.
    """
    if not NAME_PATTERN.fullmatch(row.name):  # a terminal shows it
        raise ValueError(row.name)
    if row.last_number is None and row.last_report is None:
        return None
    told = row.last_report and DeviceReport.model_validate_json(row.last_report)
    checked = _checked(row, held) if told and row.device is not None else None  # the archive never takes the last one
    lost = (
        checked is not None and checked.proof == "unverifiable" and checked.report.schema_version > 2
    )  # 0.2 kept no such report
    if checked is None or checked.report != told or checked.proof == "forged" or lost:
        raise OperatorError(
            f"the last report of {row.name} was changed in the database; check who may write to it, and restore it from a backup"
        )
    return checked


def open_fleet(database: str, writer: bool = True) -> Fleet:
    """Open the fleet for a gateway, which writes much and answers only for what is durable.

    Args:
        database: SQLAlchemy's URL. SQLite keeps a log beside the file from now on, so that readers and the writer do not wait for each
            other, and syncs it before each answer. PostgreSQL is asked whether it does.
        writer: whether this process writes.

    Raises:
        TransferError, OperatorError: as `Register`; OperatorError also if the server does not commit durably.
    """
    return Fleet(database, writer=writer, many=writer)


_REPORTS = select(reports).select_from(reports)
_COUNTING = (
    select(devices).select_from(devices.outerjoin(last, devices.c.device == last.c.device))
    .where(devices.c.confirmed.is_not(None), devices.c.retired.is_(None)).order_by(devices.c.device)
)  # fmt: skip
_DECIDING = (
    select(devices.c.device.label("name"), last.c.number.label("last_number"), last.c.report.label("last_report"), reports)
    .select_from(
        devices.outerjoin(last, devices.c.device == last.c.device)
        .outerjoin(reports, and_(reports.c.device == last.c.device, reports.c.number == last.c.number))
    )
    .where(devices.c.confirmed.is_not(None), devices.c.retired.is_(None)).order_by(devices.c.device)
)  # fmt: skip
_STATES = (
    select(
        devices.c.device, devices.c.line, devices.c.device_class, devices.c.confirmed, devices.c.retired, devices.c.tags,
        last.c.number, last.c.received_at, last.c.heard_at, last.c.heartbeat_at, last.c.line, last.c.device_class, last.c.active,
        last.c.agent, last.c.event, last.c.reason, last.c.tags, last.c.skew, func.coalesce(last.c.conflicts, 0), last.c.conflict_at,
        func.coalesce(last.c.refused, 0), last.c.refused_at, last.c.refused_why,
    )
    .select_from(devices.outerjoin(last, devices.c.device == last.c.device)).order_by(devices.c.device)
)  # fmt: skip
# On PostgreSQL in a statement of its own: the one after it then sees what whoever held the rows has committed.
_HELD = (
    select(devices.c.device).where(devices.c.device.in_(bindparam("names", expanding=True))).order_by(devices.c.device)
    .with_for_update()
)  # fmt: skip
_STATE_KINDS = [(int if "int" in str(field.type) else str, type(None)) for field in fields(LastState)]
_KNOWN = (
    select(
        devices.c.device, devices.c.public_key, devices.c.line, devices.c.device_class, devices.c.retired,
        *(column for column in last.c if column.name not in ("device", "line", "device_class")),
        last.c.device.label("has_last"), last.c.line.label("told_line"), last.c.device_class.label("told_class"),
    )
    .select_from(devices.outerjoin(last, devices.c.device == last.c.device))
    .where(devices.c.device.in_(bindparam("names", expanding=True))).order_by(devices.c.device)
)  # fmt: skip
_THERE = select(reports.c.device, reports.c.number, reports.c.body, reports.c.envelope).where(
    tuple_(reports.c.device, reports.c.number).in_(bindparam("pairs", expanding=True))
)
_LAST_FIELDS = [column.name for column in last.c if column.name != "device"]
_UPDATE_LAST = (
    update(last).where(last.c.device == bindparam("of")).values({name: bindparam(f"new_{name}") for name in _LAST_FIELDS})
)
_INSERT_LAST, _INSERT_REPORTS = insert(last), insert(reports)


def _state(row: Row[Any]) -> LastState:
    """Return a row as a value; others may write to the database, too.

    Raises:
        ValueError: it holds something else than ferry writes.
    """
    made = LastState(*row)
    sound = all(map(isinstance, row, _STATE_KINDS))
    words = [word for word in row if isinstance(word, str)] + [*made.tags, *made.tags.values()]
    if not (sound and NAME_PATTERN.fullmatch(made.device) and "".join(words).isprintable()):
        raise ValueError(made)
    return made


@lru_cache(maxsize=10_000)  # most devices have the tags of others
def _tags(told: str, own: str) -> dict[str, str]:
    """Return the tags of a device by name, from both columns."""
    found: dict[str, str] = dict(str(tag).split("=", 1) for tag in json.loads(told))
    given: dict[str, str] = json.loads(own)
    return found | given


def _of(device: str | None) -> Select[Any]:
    return _REPORTS if device is None else _REPORTS.where(reports.c.device == device)


class _History:
    """Keys of some devices and until when each was in use.

    They are read after the reports that they verify: a key that is replaced in between still vouches for what came before.
    """

    def __init__(self, connection: Connection, names: Iterable[str]) -> None:
        self._held: dict[str, list[tuple[str, int | None]]] = {}
        these = sorted(names)
        query = select(keys.c.device, keys.c.public_key, keys.c.until).where(keys.c.device.in_(these))
        for row in connection.execute(query).all():
            self._held.setdefault(row.device, []).append((row.public_key, row.until))
        for row in connection.execute(select(devices.c.device, devices.c.public_key).where(devices.c.device.in_(these))).all():
            self._held.setdefault(row.device, [(row.public_key, None)])  # a ferry of 0.2 on the same database enrolled it

    def signed(self, opened: Opened, at: int) -> bool:
        """Check whether a key that the device still had at a time signed the report.

        A former key vouches for nothing that came after it was replaced: whoever finds the old device may have it.
        """
        held = self._held.get(opened.report.device, [])
        return any((until is None or at <= until) and opened.is_signed_by(key) for key, until in held)


class _Batch:
    """Reports that are kept in one transaction: what is known of their devices, what is decided, and what is written."""

    def __init__(self, connection: Connection, arrived: Sequence[Arrived], names: Iterable[str], now: int, live: bool) -> None:
        self._connection, self._now, self._live = connection, now, live
        if connection.dialect.name != "sqlite":  # there the whole file is held
            connection.execute(_HELD, {"names": sorted(names)}).all()
        self._known: dict[str, Row[Any]] = {row.device: row for row in connection.execute(_KNOWN, {"names": sorted(names)})}
        self._last: dict[str, dict[str, Any]] = {}
        self._fresh: dict[tuple[str, int], Opened] = {}
        self._timed: dict[str, int] = {}
        # Also numbers above the highest: a ferry of 0.2 on the same database keeps reports, and does not know the last states.
        pairs = sorted({(a.opened.report.device, a.opened.report.number) for a in arrived})
        rows: Iterable[Row[Any]] = connection.execute(_THERE, {"pairs": pairs}) if pairs else []
        self._there: dict[tuple[str, int], Row[Any]] = {(row.device, row.number): row for row in rows}

    def _state(self, device: str) -> dict[str, Any]:
        """Return the device's row of `last`, which is written in the end."""
        if device not in self._last:
            row = self._known[device]._mapping  # noqa: SLF001 - SQLAlchemy's way to the fields by name
            made = {name: row[name] for name in _LAST_FIELDS if name not in ("line", "device_class")}
            made |= {"line": row["told_line"], "device_class": row["told_class"]}
            self._last[device] = made | {"conflicts": made["conflicts"] or 0, "refused": made["refused"] or 0}
        return self._last[device]

    def highest(self, device: str) -> int:
        """Return the highest number that is kept of a device; 0: none."""
        if device not in self._known:
            return 0
        return int(self._state(device)["number"] or 0)

    def decide(self, arrived: Arrived) -> tuple[str, int, str, str]:
        """Decide on a report: its device, its number, the code and the reason."""
        report = arrived.opened.report
        device, number = report.device, report.number
        known = self._known.get(device)
        if known is None:
            return device, number, "unenrolled", f"{device} is not enrolled; run `ferry fleet enroll {device} KEY`"
        if known.retired is not None:
            return self._refuse(report, "retired", f"{device} is retired; its reports are refused")
        if known.public_key != arrived.key:
            return self._refuse(report, "signature", f"the report is not signed by {device}'s present key")
        if (known.line or report.line, known.device_class or report.device_class) != (report.line, report.device_class):
            return self._refuse(
                report, "line",
                f"{device} is enrolled for {known.line}/{known.device_class}, and its report names {report.line}/{report.device_class}",
            )  # fmt: skip
        state = self._state(device)
        if (kept := self._kept(arrived.opened, state["number"] or 0)) is not None:
            if kept:
                state["heard_at"] = self._now
                if number > (state["number"] or 0):  # a ferry of 0.2 on the same database kept it
                    self._note(state, arrived.opened)
                return device, number, "", ""
            state["conflicts"] += 1
            state["conflict_at"] = self._now
            return device, number, "conflict", f"{device} has already sent another report number {number}"
        self._fresh[device, number] = arrived.opened
        self._note(state, arrived.opened)
        return device, number, "", ""

    def _refuse(self, report: DeviceReport, code: str, reason: str) -> tuple[str, int, str, str]:
        state = self._state(report.device)
        state |= {"refused": state["refused"] + 1, "refused_at": self._now, "refused_why": code}
        return report.device, report.number, code, reason

    def _kept(self, opened: Opened, highest: int) -> bool | None:
        """Check whether this report is kept already; False: another one has its number; None: none has.

        What is in the archive cannot be compared. Its number counts as that of another report, so that the device signs this one under a new
        number: twice in the archive is better than nowhere.
        """
        report = opened.report
        if (waiting := self._fresh.get((report.device, report.number))) is not None:
            return waiting.message == opened.message
        row = self._there.get((report.device, report.number))
        if row is None:
            if report.number > highest:  # the archive never takes the highest
                return None
            ranges = select(archived.c.first).where(
                archived.c.device == report.device, archived.c.first <= report.number, archived.c.last >= report.number
            )
            return False if self._connection.execute(ranges).first() else None
        if row.envelope is None:
            return DeviceReport.model_validate_json(row.body) == report
        return bool(row.envelope.encode() == opened.line) or open_line(row.envelope.encode()).message == opened.message

    def _note(self, state: dict[str, Any], opened: Opened) -> None:
        """Note a new report in the last state of its device."""
        report, now = opened.report, self._now
        state["heard_at"] = now
        ahead = report.time - now
        if self._live or ahead > 0 or report.time < NEVER_SET:
            before = self._timed.get(report.device)
            self._timed[report.device] = state["skew"] = ahead if before is None else max(before, ahead)
        if report.event == "alive" and report.health is not None and report.number > (state["heartbeat"] or 0):
            state |= {"heartbeat": report.number, "heartbeat_at": now, "tags": json.dumps(report.health.tags)}
        elif report.event != "alive" and report.number > (state["event_number"] or 0):
            state |= {"event_number": report.number, "event": report.event, "reason": report.reason}
        if report.number > (state["number"] or 0):
            state |= {
                "number": report.number, "report": report, "received_at": now, "line": report.line,
                "device_class": report.device_class, "active": report.active, "agent": report.agent,
            }  # fmt: skip

    def write(self, refused: Mapping[str, int]) -> None:
        """Write the new reports and the last states."""
        for device, count in refused.items():
            if device in self._known:
                state = self._state(device)
                state |= {"refused": state["refused"] + count, "refused_at": self._now, "refused_why": "signature"}
        if self._fresh:
            self._connection.execute(_INSERT_REPORTS, [
                {
                    "device": device, "number": number, "received_at": self._now, "event": opened.report.event,
                    "manifest": opened.report.manifest, "envelope": opened.line.decode(),
                }
                for (device, number), opened in self._fresh.items()
            ])  # fmt: skip
        for state in self._last.values():
            if isinstance(state["report"], DeviceReport):
                state["report"] = state["report"].model_dump_json()
        there = {device: state for device, state in self._last.items() if self._known[device].has_last is not None}
        if there:
            rows = [{"of": device} | {f"new_{name}": value for name, value in state.items()} for device, state in there.items()]
            self._connection.execute(_UPDATE_LAST, rows)
        if missing := self._last.keys() - there.keys():
            self._connection.execute(_INSERT_LAST, [{"device": device} | self._last[device] for device in sorted(missing)])


def _left(error: OSError) -> str:
    return f"cannot be read and removed: {error.strerror}; it is left for the next time"


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
