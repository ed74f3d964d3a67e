"""The register: which devices there are, with which keys, who may enrol one, and which programs may ask the gateway.

Every time in it is by the factory's clock, in seconds since 1970.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, Self, get_args

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import Connection, and_, delete, insert, select, update

from ota.errors import AttemptsError, EnrolmentError, OperatorError, TakenError
from ota.fleet import schema
from ota.fleet.schema import changes, devices, invites, keys, last, reading, tokens, writing
from ota.manifest import MOST_TAGS, NAME_PATTERN
from ota.report import Enrolment

Role = Literal["reporter", "viewer", "operator"]
MOST_ATTEMPTS: Final = 5  # wrong uses of a token, after which it is refused for good
TAG_SEPARATOR = "="


@dataclass(frozen=True)
class Known:
    """A device of the register."""

    device: str
    public_key: str
    """64 hex digits."""
    line: str | None
    """None: it was enrolled without one, and may name any in its reports."""
    device_class: str | None
    confirmed: bool
    """Whether an operator said that it counts."""
    retired: bool


@dataclass(frozen=True)
class Redeemed(Known):
    """A device that enrolled itself."""

    highest: int
    """Highest number of a report that is kept of it, from before it had another key; 0: none."""


@dataclass(frozen=True)
class Newcomer:
    """A device that an operator puts into the register."""

    device: str
    public_key: str
    line: str
    device_class: str
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Invite:
    """An invitation as the operator sees it; the token itself is not kept."""

    device: str
    line: str
    device_class: str
    replaces: int
    """1: the device is enrolled and gets another key."""
    made: int
    expires: int
    used: int | None
    attempts: int
    refused_at: int | None
    refused_why: str | None


@dataclass(frozen=True)
class ApiToken:
    """What a program that asks the gateway may do; the token itself is not kept."""

    name: str
    role: Role
    made: int
    expires: int


class Register:
    """Devices, their keys, invitations and API tokens, in the tables of a database."""

    def __init__(self, database: str, *, writer: bool = True, many: bool = False) -> None:
        """Open the tables of a SQLAlchemy URL; create or migrate them if needed.

        Args:
            database: the URL.
            writer: whether anything will be written; otherwise tables of another version are refused.
            many: whether this process writes for a gateway: SQLite keeps a log beside the file then, and PostgreSQL must commit durably.

        Raises:
            TransferError: the database cannot be opened, or must be migrated and cannot be written.
            OperatorError: a newer ferry made the tables, or they must be migrated and `writer` is not set.
        """
        self.engine = schema.connect(database, writer, many)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database connections."""
        self.engine.dispose()

    # Devices

    def known(self) -> dict[str, Known]:
        """Return every device of the register by its id, retired and unconfirmed ones included."""
        query = select(
            devices.c.device, devices.c.public_key, devices.c.line, devices.c.device_class, devices.c.confirmed, devices.c.retired
        )
        with reading(self.engine) as connection:
            return {
                _name(device): Known(device, key, line, device_class, confirmed is not None, retired is not None)
                for device, key, line, device_class, confirmed, retired in connection.execute(query).all()
            }

    def changes(self) -> int:
        """Return a number that rises with each change of the devices or API tokens, so that a cache knows when to read them again."""
        with reading(self.engine) as connection:
            return int(connection.execute(select(changes.c.number)).scalar_one())

    def enroll(self, device: str, public_key: str) -> None:
        """Enrol a device, so that reports which it signs with this key are accepted, and let it count; it may name any line and class.

        The same key again confirms it and changes nothing else.

        Args:
            device: its id.
            public_key: 64 hex digits of its Ed25519 key, as `ferry-agent init` prints it.

        Raises:
            OperatorError: the id or key is malformed, or the device is enrolled with another key or retired.
        """
        check_device(device)
        check_key(public_key)
        now = int(time.time())
        with writing(self.engine) as connection:
            row = _row(connection, device)
            if row is None:
                _add(connection, [Newcomer(device, public_key, "", "", {})], now)
            elif row.public_key != public_key:
                raise OperatorError(
                    f"{device} is enrolled with another key; give the replaced device a new id, or its new key with `ferry fleet rekey {device} KEY`"
                )
            elif row.retired:
                raise OperatorError(f"{device} is retired; give the device a new id")
            elif not row.confirmed:
                _set(connection, device, confirmed=now)

    def preauthorize(self, newcomers: Iterable[Newcomer]) -> int:
        """Put devices into the register before they report, all or none, and return how many are new; they count at once.

        Raises:
            OperatorError: an id, key or tag is malformed, or a device is enrolled with other values.
        """
        asked = list(newcomers)
        for newcomer in asked:
            check_device(newcomer.device)
            check_key(newcomer.public_key)
        with writing(self.engine) as connection:
            query = select(devices.c.device, devices.c.public_key, devices.c.line, devices.c.device_class, devices.c.retired)
            there = {row.device: row for row in connection.execute(query).all()}
            fresh = []
            for newcomer in asked:
                row = there.get(newcomer.device)
                if row is None:
                    fresh.append(newcomer)
                elif (row.public_key, row.line, row.device_class, row.retired) != (
                    newcomer.public_key, newcomer.line, newcomer.device_class, None,
                ):  # fmt: skip
                    raise OperatorError(
                        f"{newcomer.device} is enrolled with another key, line or class, or is retired; take it out of the list, or give the "
                        "device a new id; nothing was changed"
                    )
            _add(connection, fresh, int(time.time()))
        return len(fresh)

    def confirm(self, device: str) -> None:
        """Let a device count in decisions, such as whom a release leaves behind.

        Raises:
            OperatorError: it is not enrolled, or is retired.
        """
        with writing(self.engine) as connection:
            row = _known_row(connection, device)
            if not row.confirmed:
                _set(connection, device, confirmed=int(time.time()))

    def retire(self, device: str) -> None:
        """Take a device out of use for good: its reports are refused from now on; those that are kept stay.

        Raises:
            OperatorError: it is not enrolled.
        """
        with writing(self.engine) as connection:
            if _row(connection, device) is None:
                raise _unknown(device)
            now = int(time.time())
            changed = update(devices).where(devices.c.device == device, devices.c.retired.is_(None)).values(retired=now)
            if connection.execute(changed).rowcount:
                connection.execute(delete(invites).where(invites.c.device == device, invites.c.used.is_(None)))
                _count(connection)

    def rekey(self, device: str, public_key: str) -> None:
        """Give a device another key, and refuse the former one from now on; the kept reports stay, and so does the key that verifies them.

        Raises:
            OperatorError: it is not enrolled or is retired, the key is malformed, or the device had it before.
        """
        check_key(public_key)
        with writing(self.engine) as connection:
            if _known_row(connection, device).public_key != public_key:
                _rekey(connection, device, public_key, int(time.time()))

    def tag(self, device: str, tags: Mapping[str, str]) -> dict[str, str]:
        """Set an operator's tags of a device, and return all of them; an empty value removes one.

        Raises:
            OperatorError: the device is not enrolled or is retired, or has more than `MOST_TAGS` tags.
        """
        with writing(self.engine) as connection:
            made = {**json.loads(_known_row(connection, device).tags), **tags}
            made = {name: value for name, value in sorted(made.items()) if value}
            if len(made) > MOST_TAGS:
                raise OperatorError(f"a device has at most {MOST_TAGS} tags; remove one with `ferry fleet tag {device} NAME=`")
            _set(connection, device, tags=json.dumps(made))
        return made

    # Invitations

    def invite(self, device: str, line: str, device_class: str, seconds: int, *, replaces: bool = False) -> str:
        """Make a token with which a device enrols itself once, and return it; it is kept as a hash.

        An earlier unused token for the id is void from now on.

        Args:
            device: id that the token is for.
            line: that the device will have.
            device_class: that the device will have.
            seconds: how long the token is valid.
            replaces: whether the device is enrolled and gets another key.

        Raises:
            OperatorError: the id is malformed, or is enrolled although `replaces` is not set, or the other way round.
        """
        check_device(device)
        token, now = secrets.token_urlsafe(32), int(time.time())
        with writing(self.engine) as connection:
            if replaces:
                row = _known_row(connection, device)
                line, device_class = row.line or line, row.device_class or device_class
            elif _row(connection, device) is not None:
                raise OperatorError(
                    f"{device} is enrolled already; give the device a new id, or this one another key with `ferry fleet rekey {device} --invite`"
                )
            connection.execute(delete(invites).where(invites.c.device == device, invites.c.used.is_(None)))
            connection.execute(
                insert(invites).values(
                    sha256=sha256(token), device=device, line=line, device_class=device_class, replaces=int(replaces),
                    made=now, expires=now + seconds,
                )
            )  # fmt: skip
        return token

    def redeem(self, enrolment: Enrolment, now: int | None = None) -> Redeemed:
        """Enrol the device that shows a token; it counts in decisions once an operator confirms it.

        The very same enrolment again, such as after an answer that got lost, is answered as before and changes nothing.

        Args:
            enrolment: what the device sent.
            now: seconds since 1970; None: by the clock.

        Raises:
            AttemptsError: the token was tried too often with wrong data.
            TakenError: the token was used before, or the id is enrolled.
            EnrolmentError: the token is unknown, expired or for another device, line or class, or the sender does not hold the key.
        """
        now = int(time.time()) if now is None else now
        digest = sha256(enrolment.token)
        fault: EnrolmentError | None = None
        with writing(self.engine) as connection:
            invite = connection.execute(select(invites).where(invites.c.sha256 == digest).with_for_update()).first()
            if invite is None:
                raise EnrolmentError("the token is unknown; ask for a new one, which `ferry fleet invite` makes")
            row = _row(connection, invite.device)
            fault = _fault(enrolment, invite, row, now)
            if fault is None and invite.used is None and _had(connection, enrolment):
                fault = TakenError(
                    "this key was used before; run `ferry-agent init --new-key` on the device, then enroll it with the same token"
                )
            if fault is None:
                if invite.used is None:
                    _redeem(connection, enrolment, digest, now, known=row is not None)
                made = _redeemed(connection, enrolment.device)
            elif not isinstance(fault, AttemptsError):
                connection.execute(
                    update(invites).where(invites.c.sha256 == digest)
                    .values(attempts=invites.c.attempts + 1, refused_at=now, refused_why=str(fault)[:200])
                )  # fmt: skip
        if fault is not None:
            raise fault  # after the commit, so that the attempt is counted
        return made

    def invites(self) -> list[Invite]:
        """Return all invitations, the newest first."""
        query = select(
            invites.c.device, invites.c.line, invites.c.device_class, invites.c.replaces, invites.c.made, invites.c.expires,
            invites.c.used, invites.c.attempts, invites.c.refused_at, invites.c.refused_why,
        ).order_by(invites.c.made.desc(), invites.c.device)  # fmt: skip
        with reading(self.engine) as connection:
            return [Invite(*row) for row in connection.execute(query).all()]

    # API tokens

    def add_token(self, name: str, role: str, seconds: int) -> str:
        """Make an API token, and return it; it is kept as a hash.

        Raises:
            OperatorError: the name is malformed or taken, or there is no such role.
        """
        if not NAME_PATTERN.fullmatch(name):
            raise OperatorError(f"{name!r} is not a name; use lower-case letters, digits and '-', at most 40")
        if role not in get_args(Role):
            raise OperatorError(f"there is no role {role!r}; give {', '.join(get_args(Role))}")
        token, now = secrets.token_urlsafe(32), int(time.time())
        with writing(self.engine) as connection:
            if connection.execute(select(tokens.c.name).where(tokens.c.name == name)).first():
                raise OperatorError(
                    f"there is a token {name} already; remove it with `ferry fleet token remove {name}`, or choose another name"
                )
            values = {"name": name, "sha256": sha256(token), "role": role, "made": now, "expires": now + seconds}
            connection.execute(insert(tokens).values(values))
            _count(connection)
        return token

    def api_tokens(self) -> list[ApiToken]:
        """Return the API tokens by name."""
        query = select(tokens.c.name, tokens.c.role, tokens.c.made, tokens.c.expires).order_by(tokens.c.name)
        with reading(self.engine) as connection:
            return [ApiToken(*row) for row in connection.execute(query).all()]

    def remove_token(self, name: str) -> None:
        """Remove an API token, which is refused from now on.

        Raises:
            OperatorError: there is none of this name.
        """
        with writing(self.engine) as connection:
            if not connection.execute(delete(tokens).where(tokens.c.name == name)).rowcount:
                raise OperatorError(f"there is no token {name!r}; `ferry fleet token list` shows them")
            _count(connection)

    def role_of(self, token: str, now: int | None = None) -> Role | None:
        """Return what the holder of an API token may do; None: the token is unknown or expired."""
        now = int(time.time()) if now is None else now
        query = select(tokens.c.role).where(tokens.c.sha256 == sha256(token), tokens.c.expires > now)
        with reading(self.engine) as connection:
            role: Role | None = connection.execute(query).scalar()
        return role if role in get_args(Role) else None


def check_device(device: str) -> None:
    """Refuse an id that no device can have.

    Raises:
        OperatorError: it is malformed.
    """
    if not NAME_PATTERN.fullmatch(device):
        raise OperatorError(f"{device!r} is not a device id; use lower-case letters, digits and '-', at most 40")


def check_key(public_key: str) -> None:
    """Refuse a public key that is none.

    Raises:
        OperatorError: it is malformed.
    """
    try:
        if public_key != public_key.lower():
            raise ValueError
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
    except ValueError:
        raise OperatorError("the public key must be 64 hex digits; copy it from `ferry-agent init`") from None


def sha256(token: str) -> str:
    """Return the hash under which a token is kept."""
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()


def _name(name: str) -> str:
    """Return the id of a row as it is; others may write to the database, and a terminal shows it."""
    if not NAME_PATTERN.fullmatch(name):
        raise ValueError(name)
    return name


def _row(connection: Connection, device: str):  # type: ignore[no-untyped-def]  # noqa: ANN202 - a row of `devices`
    return connection.execute(select(devices).where(devices.c.device == device).with_for_update()).first()


def _known_row(connection: Connection, device: str):  # type: ignore[no-untyped-def]  # noqa: ANN202
    row = _row(connection, device)
    if row is None:
        raise _unknown(device)
    if row.retired:
        raise OperatorError(f"{device} is retired; enrol the device under a new id")
    return row


def _unknown(device: str) -> OperatorError:
    return OperatorError(f"{device!r} is not enrolled; `ferry fleet list` shows the devices")


def _add(connection: Connection, newcomers: list[Newcomer], now: int, *, confirmed: bool = True) -> None:
    """Put new devices into the register."""
    if not newcomers:
        return
    connection.execute(insert(devices), [
        {
            "device": new.device, "public_key": new.public_key, "enrolled": now, "line": new.line or None,
            "device_class": new.device_class or None, "confirmed": now if confirmed else None, "tags": json.dumps(dict(new.tags)),
        }
        for new in newcomers
    ])  # fmt: skip
    connection.execute(insert(keys), [
        {"device": new.device, "number": 1, "public_key": new.public_key, "since": now} for new in newcomers
    ])  # fmt: skip
    connection.execute(insert(last), [{"device": new.device} for new in newcomers])
    _count(connection)


def _set(connection: Connection, device: str, **values: object) -> None:
    connection.execute(update(devices).where(devices.c.device == device).values(**values))
    _count(connection)


def _count(connection: Connection) -> None:
    """Note that the devices or API tokens changed."""
    connection.execute(update(changes).values(number=changes.c.number + 1))


def _rekey(connection: Connection, device: str, public_key: str, now: int) -> None:
    mine = keys.c.device == device
    held = connection.execute(select(keys.c.number, keys.c.public_key).where(mine)).all()
    if public_key in {row.public_key for row in held}:
        raise OperatorError(f"{device} had this key before; make a new one with `ferry-agent init --new-key` on the device")
    if not held:  # a ferry of 0.2 on the same database enrolled it
        former = connection.execute(select(devices.c.public_key, devices.c.enrolled).where(devices.c.device == device)).one()
        row = {"device": device, "number": 1, "public_key": former.public_key, "since": former.enrolled, "until": now}
        connection.execute(insert(keys).values(row))
    connection.execute(update(keys).where(and_(mine, keys.c.until.is_(None))).values(until=now))
    number = max((row.number for row in held), default=1) + 1
    connection.execute(insert(keys).values(device=device, number=number, public_key=public_key, since=now))
    _set(connection, device, public_key=public_key)


def _fault(enrolment: Enrolment, invite, row, now: int) -> EnrolmentError | None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Return why an enrolment is refused; None: it is not.

    Args:
        enrolment: what the device sent.
        invite: the row of its token.
        row: the device's row in the register, if it has one.
        now: seconds since 1970.
    """
    again = "ask for a new one, which `ferry fleet invite` makes"
    if invite.attempts >= MOST_ATTEMPTS:
        return AttemptsError(f"the token was tried {MOST_ATTEMPTS} times with wrong data and is void; {again}")
    if (invite.device, invite.line, invite.device_class) != (enrolment.device, enrolment.line, enrolment.device_class):
        return EnrolmentError(f"the token is for another device, line or class; {again}")
    if not enrolment.is_signed:
        return EnrolmentError("the enrolment is not signed by the key that it names; run `ferry-agent enroll` on the device")
    if invite.used is not None:
        if row is not None and row.public_key == enrolment.public_key and not row.retired:
            return None  # the answer got lost, and the device asks again
        return TakenError(f"the token was used before; {again}")
    if now >= invite.expires:
        return EnrolmentError(f"the token has expired; {again}")
    if row is not None and (not invite.replaces or row.retired):
        return TakenError("a device with this id is enrolled or retired; choose another id")
    if row is None and invite.replaces:
        return EnrolmentError(f"there is no device whose key the token could replace; {again}")
    return None


def _had(connection: Connection, enrolment: Enrolment) -> bool:
    """Check whether the device had the key before."""
    mine = and_(keys.c.device == enrolment.device, keys.c.public_key == enrolment.public_key)
    return connection.execute(select(keys.c.number).where(mine)).first() is not None


def _redeem(connection: Connection, enrolment: Enrolment, digest: str, now: int, *, known: bool) -> None:
    """Add the device or its new key, which no operator has confirmed yet."""
    if known:
        _rekey(connection, enrolment.device, enrolment.public_key, now)
        _set(connection, enrolment.device, confirmed=None)
    else:
        new = Newcomer(enrolment.device, enrolment.public_key, enrolment.line, enrolment.device_class, {})
        _add(connection, [new], now, confirmed=False)
    connection.execute(update(invites).where(invites.c.sha256 == digest).values(used=now))


def _redeemed(connection: Connection, device: str) -> Redeemed:
    query = select(devices, last.c.number.label("highest")).select_from(
        devices.outerjoin(last, devices.c.device == last.c.device)
    )
    row = connection.execute(query.where(devices.c.device == device)).one()
    return Redeemed(
        row.device,
        row.public_key,
        row.line,
        row.device_class,
        row.confirmed is not None,
        row.retired is not None,
        int(row.highest or 0),
    )
