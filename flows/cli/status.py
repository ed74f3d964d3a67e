"""`ferry status`: everything that somebody asks first, on one screen of 80 columns and 24 lines."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING

from flows.cli.shared import Json, answer, open_workspace, reported_errors
from ota.durations import utc
from ota.errors import printable

if TYPE_CHECKING:
    from flows.status import DeviceStanding, Standing
    from ota.fleet.register import Invite

WIDTH, LINES, LABEL = 80, 24, 10
SHOWN = 50  # devices of `ferry fleet status` without --all
TROUBLE = ("rolled_back", "refused", "base_corrupt", "strayed")  # events that somebody should read about
CLASSES, WAITS, NAMED = 3, 2, 3  # most lines about device classes, things that wait, and names of devices; models get the rest


def status(as_json: Json = False) -> None:
    """Show models, rollouts, what waits, what runs and devices.

    It reads the ledger, the signed repository and the devices' reports, and names the command that comes next. --json has everything
    that one screen leaves out.
    """
    with reported_errors():
        workspace = open_workspace()
        from flows.status import gather

        found, error = gather(workspace)
        answer(as_json, found.model_dump(mode="json"), text_of(found))
        if error:
            raise error


def text_of(found: Standing) -> str:
    """Describe how a workspace stands, in at most 24 lines of 80 columns."""
    after = _section("rollouts", _rollouts(found))
    after += _section("waits", _waits(found))
    after += _section("runs", _runs(found))
    after += _section("expires", _expires(found))
    after += _section("devices", _devices(found))
    head = f"{stamp(found.now)} UTC  "
    where = printable(found.workspace, limit=4096)
    where = where if len(head + where) <= WIDTH else f"…{where[len(head) + 1 - WIDTH :]}"  # its end says more than its beginning
    return "\n".join([head + where, *_section("champions", _models(found, LINES - 1 - len(after))), *after])


def fit(text: str, width: int = WIDTH) -> str:
    """Make a text printable, and cut it to a width."""
    plain = printable(text, limit=1000)
    return plain if len(plain) <= width else f"{plain[: width - 1]}…"


def stamp(moment: datetime) -> str:
    """Write a moment to the minute, in UTC."""
    return moment.strftime("%Y-%m-%d %H:%M")


def _section(label: str, rows: Iterable[str]) -> list[str]:
    return [fit(f"{label if not i else '':{LABEL}}{row}") for i, row in enumerate(rows)]


def _some(rows: list[str], room: int) -> list[str]:
    return rows if len(rows) <= room else [*rows[: room - 1], f"… and {len(rows) - room + 1} more; --json lists all"]


def _models(found: Standing, room: int) -> list[str]:
    rows = []
    for m in found.models:
        newest = f"; newest {m.newest}: {m.outcome}" if m.newest and m.newest != m.champion else ""
        champion = f"{m.champion} since {m.since[:10]}, by {m.who}" if m.champion else "no champion"
        rows.append(f"{m.subject:22} {champion}{newest}")
    return _some(rows, room)


def _rollouts(found: Standing) -> list[str]:
    return _some([f"{c.line + '/' + c.device_class:22} {c.rollout}" for c in found.classes], CLASSES)


def _waits(found: Standing) -> list[str]:
    rows = [row for w in found.waits[:WAITS] for row in (w.what, f"  {w.command}")]
    left = len(found.waits) - WAITS
    return ([*rows, f"… and {left} more; --json lists all"] if left > 0 else rows) or ["nothing for a person"]


def _runs(found: Standing) -> list[str]:
    from flows.running import PARTS
    from flows.status import age

    rows = []
    for run in found.runs:
        since = f" for {age((found.now - run.began).total_seconds())}" if run.began else ""
        process = f" (process {run.pid})" if run.pid else ""
        rows.append(f"{PARTS[run.part]}{f' of {run.what}' if run.what else ''}{since}{process}")
        rows += [f"  {run.doing}"] if run.doing else []
    return rows or ["nothing"]


def _expires(found: Standing) -> list[str]:
    from flows.status import age

    if not found.expires:
        return []
    first = found.expires[0]
    left = (first.at - found.now).total_seconds()
    when = f"in {age(left)}" if left > 0 else f"since {age(-left)}"
    urgent = [e for e in found.expires if e.alarm]
    rows = [f"{first.role} {when} ({stamp(first.at)}), first of {len(found.expires)} signatures"]
    return rows + ([f"  {urgent[0].command}  (past half of its life: {', '.join(e.role for e in urgent)})"] if urgent else [])


def _devices(found: Standing) -> list[str]:
    used = [d for d in found.devices if d.state != "retired"]
    silent = [d for d in used if d.heard is None or "silent" in d.concerns]
    heard = [d for d in used if d.heard is not None]
    behind = [d for d in heard if d.behind]
    if not found.devices:
        return ["none is enrolled; ferry fleet enroll DEVICE KEY"]
    last = max((d.heard for d in heard if d.heard), default=None)
    when = f", last {stamp(last)}" if last and not found.unread else ""
    unread = f"; {found.unread} unread: ferry fleet status" if found.unread else ""
    rows = [f"{len(used)} enrolled, {len(heard)} heard{when}, {len(silent)} silent{unread}"]
    rows += [f"  silent: {_names(silent)}"] if silent else []
    old = [d for d in heard if d.too_old]
    rows += [f"  agent too old for what is rolled out: {_names(old)}"] if old else []
    return rows + ([f"  open to them, but not running it: {_names(behind)}"] if behind else [])


def _names(devices: list[DeviceStanding]) -> str:
    more = f" and {len(devices) - NAMED} more" if len(devices) > NAMED else ""
    return ", ".join(d.device for d in devices[:NAMED]) + more


def fleet_text(devices: list[DeviceStanding], every: bool = False) -> str:
    """Describe each device on a line: when it was heard, what it runs, its wave, and its last report; what needs attention and counts follow.

    Of more than `SHOWN` devices, only those that need attention are shown, unless all are asked for. Retired ones are counted.
    """
    used = [d for d in devices if d.state != "retired"]
    many = len(used) > SHOWN and not every
    shown = [d for d in used if d.concerns or d.event in TROUBLE] if many else used
    rows = _table(shown[:SHOWN] if many else shown)
    if many:
        left = f"{len(used) - min(len(shown), SHOWN):,} other devices are not shown; --all shows each, `ferry fleet list --where` chooses"
        rows = [*rows, left] if shown else [left]
    return "\n".join([*rows, *_attention(used), *_counts(used), *_retired(devices)])


def _retired(devices: list[DeviceStanding]) -> list[str]:
    gone = sum(d.state == "retired" for d in devices)
    return [f"{gone} of {len(devices)} devices: retired"] if gone else []


def _attention(devices: list[DeviceStanding]) -> list[str]:
    """Name the devices that need attention, by what it is about."""
    kinds: dict[str, list[DeviceStanding]] = {}
    for d in devices:
        for kind in d.concerns:
            kinds.setdefault(kind, []).append(d)
    rows = []
    for kind, named in sorted(kinds.items()):
        rows.append(f"needs attention, {kind}: {_names(named)}")
        rows += [f"  {d.device}: {d.concerns[kind]}" for d in named[:NAMED]]
    return rows


def _table(devices: list[DeviceStanding]) -> list[str]:
    rows = [f"{'device':20}  {'heard (UTC)':16}  {'event':11}  {'release':8}  {'wave':6}  {'agent':14}  why"]
    for d in devices:
        runs = f"{d.release}" if d.release else f"{d.runs[:8]}" if d.runs else "-"
        wave = f"{d.wave} of {d.waves}" if d.wave else "-"
        heard = stamp(d.heard) if d.heard else "never"
        rows.append(f"{d.device:20}  {heard:16}  {d.event or 'silent':11}  {runs:8}  {wave:6}  {d.agent:14}  {d.reason}".rstrip())
    return rows


def _counts(devices: list[DeviceStanding]) -> list[str]:
    """Count devices by class and release."""
    groups: dict[tuple[str, str, int], int] = {}
    for d in devices:
        if d.heard:
            key = (d.line, d.device_class, d.release or 0)
            groups[key] = groups.get(key, 0) + 1
    old = sum(d.too_old for d in devices)
    silent, behind = sum(d.heard is None for d in devices), sum(d.behind for d in devices)
    of = f"of {len(devices)} devices"
    rows = [
        f"{count} {of}: {line}/{device_class}, {f'release {release}' if release else 'no release that is listed'}"
        for (line, device_class, release), count in sorted(groups.items())
    ]
    rows += [f"{behind} {of}: their wave is open, and they do not run the release"] if behind else []
    rows += [f"{old} {of}: their agent is too old for the release that is rolled out"] if old else []
    return rows + ([f"{silent} {of}: silent"] if silent else [])


def refused_tokens(invites: Iterable[Invite], now: int) -> list[str]:
    """Name the tokens for enrolment that were refused lately, and why."""
    from flows.status import RECENT

    return [
        f"needs attention, token of {invite.device}: refused {invite.attempts} times, last at {utc(invite.refused_at)}: {printable(invite.refused_why or '')}"
        for invite in invites
        if invite.refused_at is not None and now - invite.refused_at < RECENT
    ]
