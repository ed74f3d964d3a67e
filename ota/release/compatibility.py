"""Which agents can read which form of a bundle, and which devices a release leaves behind. Only values; no I/O.

A device asks nobody before it reads a manifest: an agent that does not know its form says so and keeps what runs. So the factory has to
know beforehand. Devices name their agent in each report.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import ota
from ota.errors import LeftBehindError
from ota.manifest import Manifest, as_numbers
from ota.report import DeviceReport

READ_SINCE: dict[int, str] = {1: "0.1.0", 2: "0.1.0", 3: "0.2.0", 4: "0.3.0"}
"""Form of a manifest → oldest agent that reads it."""
OLDEST_AGENT = READ_SINCE[min(READ_SINCE)]
BUILT_FOR = (READ_SINCE[max(READ_SINCE)], READ_SINCE[max(READ_SINCE) - 1])  # agents for which `oldest_agent` has bundles made
NOT_NAMED = f"{OLDEST_AGENT} or older"  # the agent of a device whose reports do not name it
UNKNOWN = "unknown"  # that of a device that never reported
OWN_ROLES_SINCE = "0.3.0"
"""Oldest agent that remembers the versions of a class's own roles (`ota.release.delegation`)."""
UNSIGNED = ", which version 0.2 kept without the signature"
SIGNED_SINCE = "0.3.0"
"""Oldest agent whose reports a factory keeps with their signatures only; version 0.2 takes none of it without setting it aside."""
POLICY_2_SINCE = "0.3.0"
"""Oldest agent that obeys policy 2 (`ota.policy`)."""
SHOWN = 10  # devices that a message names; the others are counted


@dataclass(frozen=True)
class Behind:
    """A device whose agent is too old for a bundle."""

    device: str
    agent: str
    """Its version in words."""
    unsigned: bool = False
    """Whether the report that names it has lost its signature, because version 0.2 kept it."""


def minimum_agent(form: int) -> str:
    """Return the oldest agent that reads a form."""
    return READ_SINCE[form]


def newest_form(oldest_agent: str | None = None) -> int:
    """Return the newest form that an agent reads; None: the newest form."""
    if oldest_agent is None:
        return max(READ_SINCE)
    known = [form for form, since in READ_SINCE.items() if not is_older(oldest_agent, since)]
    return max(known, default=min(READ_SINCE))


def oldest_agent(line: str, device_class: str, last: Mapping[str, DeviceReport | None]) -> str:
    """Return the agent that a bundle is made for where nobody says: this version's, or the one before while devices have older ones.

    What the newest form saves, a few kilobytes of each update, is no reason to leave a device behind.

    Args:
        line: of the bundle.
        device_class: of the bundle.
        last: last report of each enrolled device.
    """
    newest = max(READ_SINCE)
    older = any(
        is_older(report.agent or OLDEST_AGENT, READ_SINCE[newest])
        for report in last.values()
        if report and (report.line, report.device_class) == (line, device_class)
    )
    return READ_SINCE[newest - 1] if older else ota.__version__


@lru_cache(maxsize=1000)  # a fleet has few versions, and each of its devices is asked
def is_older(agent: str, minimum: str) -> bool:
    """Check whether an agent's version is older than another one."""
    return as_numbers(agent) < as_numbers(minimum)


def agent_of(report: DeviceReport | None) -> str:
    """Say which agent a device runs, by its last report; None: it never reported."""
    if report is None:
        return UNKNOWN
    return report.agent or NOT_NAMED


def left_behind(manifest: Manifest, last: Mapping[str, DeviceReport | None], unsigned: Collection[str] = ()) -> list[Behind]:
    """Find the devices that a bundle is for and whose agents are too old to read it.

    A device that never reported is not among them: it runs nothing, and neither its class nor its agent is known.

    Args:
        manifest: of the bundle.
        last: last report of each enrolled device.
        unsigned: ids of the devices whose last report can no longer be verified.
    """
    return older(manifest.line, manifest.device_class, manifest.minimum_agent, last, unsigned)


def older(
    line: str, device_class: str, minimum: str, last: Mapping[str, DeviceReport | None], unsigned: Collection[str] = ()
) -> list[Behind]:
    """Find the devices of a line and class whose agents are older than a version; the arguments are as in `left_behind`.

    A report without a signature shows at most that the agent is one of those before signatures were kept: nobody else's row lacks one.
    """
    return [
        Behind(device, agent_of(report), device in unsigned)
        for device, report in last.items()
        if report
        and (report.line, report.device_class) == (line, device_class)
        and (is_older(report.agent or OLDEST_AGENT, minimum) or (device in unsigned and not _is_former(report, minimum)))
    ]


def _is_former(report: DeviceReport, minimum: str) -> bool:
    """Check whether a report's agent and the wanted one are both of the time when no signatures were kept."""
    return is_older(report.agent or OLDEST_AGENT, SIGNED_SINCE) and is_older(minimum, SIGNED_SINCE)


def check_own_roles(
    line: str, device_class: str, last: Mapping[str, DeviceReport | None], oldest_agent: str | None, leave_behind: bool,
    unsigned: Collection[str] = (),
) -> list[Behind]:  # fmt: skip
    """Return the devices that would not remember the versions of their class's own roles, if somebody decided to leave them.

    Args:
        line: of the roles.
        device_class: of the roles.
        last: last report of each enrolled device.
        oldest_agent: oldest agent that ferry.toml names for the class; None: the newest.
        leave_behind: whether somebody decided.
        unsigned: ids of the devices whose last report can no longer be verified.

    Raises:
        LeftBehindError: there are some, and nobody decided.
    """
    place = f"{line}/{device_class}"
    found = older(line, device_class, OWN_ROLES_SINCE, last, unsigned)
    if leave_behind:
        return found
    if oldest_agent is not None and is_older(oldest_agent, OWN_ROLES_SINCE):
        raise LeftBehindError(
            f'ferry.toml says oldest_agent = "{oldest_agent}" for {place}, but roles of its own need ferry-agent {OWN_ROLES_SINCE}; raise it '
            "once all devices have that agent; nothing was signed"
        )
    if found:
        raise LeftBehindError(
            f"{place} needs ferry-agent {OWN_ROLES_SINCE} for roles of its own, but {_named(found)}; such an agent goes on updating, but does not "
            f"remember the versions of these roles; update it first, or accept that with `ferry trust delegate {place} --leave-behind`; "
            "nothing was signed"
        )
    return found


def check(
    manifest: Manifest, last: Mapping[str, DeviceReport | None], leave_behind: bool, unsigned: Collection[str] = ()
) -> list[Behind]:
    """Return the devices that a bundle leaves behind, if somebody decided to leave them.

    Args:
        manifest: of the bundle.
        last: last report of each enrolled device.
        leave_behind: whether somebody decided.
        unsigned: ids of the devices whose last report can no longer be verified.

    Raises:
        LeftBehindError: there are some, and nobody decided.
    """
    found = left_behind(manifest, last, unsigned)
    if found and not leave_behind:
        place = f"{manifest.line}/{manifest.device_class}"
        oldest = min((behind.agent.split()[0] for behind in found), key=as_numbers)
        raise LeftBehindError(
            f'{described(manifest, found)}; update their agents first, or put oldest_agent = "{oldest}" into '
            f"[lines.{manifest.line}.classes.{manifest.device_class}] of ferry.toml for a bundle in the form that they read, or leave them "
            f"behind with `ferry release {place} --leave-behind`; nothing was signed"
        )
    return found


def described(manifest: Manifest, behind: Iterable[Behind]) -> str:
    """Say which devices a bundle leaves behind, and what becomes of them; empty if there are none."""
    found = list(behind)
    if not found:
        return ""
    return f"the bundle needs ferry-agent {manifest.minimum_agent}, but {_named(found, ' and would keep what runs')}"


def _named(found: list[Behind], then: str = "") -> str:
    named = ", ".join(f"{b.device} ({b.agent}{UNSIGNED if b.unsigned else ''})" for b in found[:SHOWN])
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    count = "1 device has" if len(found) == 1 else f"{len(found)} devices have"
    return f"{count} an older one{then}: {named}{more}"
