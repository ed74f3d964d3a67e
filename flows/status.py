"""Collect how a workspace stands: models, rollouts, what waits for a person, what runs, what expires, and which devices report.

Everything comes from the ledger, the signed repository, the fleet's tables and small files. MLflow, Prefect, torch, Git and DVC are
not loaded, so the answer costs less than a second of processor time. Nothing is changed, except that new reports of devices are
received if they are few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from pydantic import Field

from flows import running, triggers
from flows.errors import FlowError
from flows.settings import DeviceClass
from flows.workspace import Workspace
from model.config import VariantName
from model.errors import ModelError
from model.pointer import recorded_md5
from model.scorecard import Frozen
from ota.errors import OtaError
from ota.fleet import query
from ota.fleet.store import LastState
from ota.policy import BUCKETS, Policy, Policy2
from ota.release import compatibility, fielded, rollout
from ota.release.metadata import LIFETIMES
from ota.release.repository import Release
from ota.release.trust import remedy
from registry.errors import RegistryError
from registry.ledger import Entry
from registry.promotion import SubjectState, of_one_full, subject_state

UNREAD = 60  # most new reports that `ferry status` receives; each takes milliseconds
SILENT = (
    2 * 86_400
)  # seconds without a heartbeat after which a device that sends them counts as silent; they are a day apart at most
SKEW = 3600  # seconds by which a clock may be wrong before that is shown
RECENT = 7 * 86_400  # seconds for which two copies of a device, and what was refused, are shown
PROBLEMS = (FlowError, ModelError, RegistryError, OtaError, OSError)


class ModelStanding(Frozen):
    """A model: its champion, and the newest version that the gate judged."""

    subject: str
    champion: int | None = Field(description="version; null: there is none")
    since: str = Field(default="", description="when it became champion")
    who: str = Field(default="", description="who made it champion")
    newest: int | None = Field(default=None, description="newest version that the gate judged")
    outcome: str = Field(default="", description="the gate's answer on the newest version")


class ClassStanding(Frozen):
    """A device class: its newest release and its rollout."""

    line: str
    device_class: str
    release: int | None = Field(description="newest release; null: there is none")
    rolled_out: int | None = Field(description="release that the policy in force names; null: there is none")
    rollout: str = Field(description="state of the rollout, in words")


class Waits(Frozen):
    """Something that waits for a person."""

    what: str
    command: str = Field(description="command that comes next")


class Expiry(Frozen):
    """A role of the signed repository and when its signature expires."""

    role: str
    at: datetime
    alarm: bool = Field(description="whether more than half of its lifetime is over")
    command: str = Field(description="command that renews it")


class DeviceStanding(Frozen):
    """A device, by its last report."""

    device: str
    heard: datetime | None = Field(description="when anything was heard of it last; null: it never reported")
    line: str = ""
    device_class: str = ""
    event: str = Field(default="", description="what the last report is about that is no heartbeat; alive: there is none")
    reason: str = ""
    runs: str = Field(default="", description="hash of the bundle that it runs; empty: none or not known")
    release: int | None = Field(default=None, description="number of the release that it runs; null: none or not known")
    wave: int | None = Field(default=None, description="wave of the present rollout that holds it, from 1; null: none")
    waves: int = Field(default=0, description="number of waves of the present rollout")
    behind: bool = Field(default=False, description="whether its wave is open and it does not run the release")
    agent: str = Field(default=compatibility.UNKNOWN, description="version of its ferry-agent, as far as it is known")
    too_old: bool = Field(default=False, description="whether its agent is too old for the release that is rolled out")
    state: str = Field(default="counts", description="counts, unconfirmed or retired: whether decisions rest on its reports")
    heartbeat: datetime | None = Field(default=None, description="when its last heartbeat came; null: none came")
    tags: dict[str, str] = Field(default={}, description="tags of the device's owner and of operators")
    concerns: dict[str, str] = Field(default={}, description="what needs attention, by its kind")


class Standing(Frozen):
    """How a workspace stands."""

    workspace: str
    now: datetime
    models: list[ModelStanding] = Field(default=[])
    classes: list[ClassStanding] = Field(default=[])
    waits: list[Waits] = Field(default=[])
    runs: list[running.Running] = Field(default=[])
    expires: list[Expiry] = Field(default=[])
    devices: list[DeviceStanding] = Field(default=[])
    rejected: dict[str, str] = Field(default={}, description="reports that were rejected just now, with the reason")
    unread: int = Field(default=0, description="reports that wait in the inbox; `ferry fleet status` receives any number of them")
    problems: list[str] = Field(default=[], description="what could not be read")


def gather(workspace: Workspace) -> tuple[Standing, Exception | None]:
    """Collect how a workspace stands; return it with the first error, if a part could not be read."""
    errors: list[Exception] = []
    found: dict[str, object] = {}

    @contextmanager
    def part() -> Iterator[None]:
        try:
            yield
        except PROBLEMS as error:
            errors.append(error)

    now = datetime.now(UTC).replace(microsecond=0)
    waits: list[Waits] = []
    with part():
        found["runs"] = running.running(workspace.work)
    with part():
        states = {
            subject: subject_state(entries) for subject, entries in _by_subject(workspace, workspace.ledger.entries()).items()
        }
        found["models"] = [_model(subject, state) for subject, state in states.items()]
        for subject, state in states.items():
            waits += _decisions(subject, state)
        if not any(running.is_held(workspace.work, part) for part in ("serving", "retraining")):  # they retrain by themselves
            waits += _data(workspace, states)
        with part():
            classes = [_class(workspace, line, name, states, waits) for line, name in _classes(workspace)]
            found["classes"] = classes
    with part():
        waits += _events(workspace)
    with part():
        found["expires"] = _expiries(workspace, now)
    with part():
        new = sum(1 for _ in workspace.inbox.glob("*.json"))
        found["unread"] = new if new > UNREAD else 0
        found["devices"], found["rejected"] = devices(workspace, receive=new <= UNREAD)
    standing = Standing.model_validate({
        "workspace": str(workspace.root), "now": now, "waits": waits, "problems": list(dict.fromkeys(map(str, errors))), **found
    })  # fmt: skip
    return standing, errors[0] if errors else None


def _by_subject(workspace: Workspace, entries: list[Entry]) -> dict[str, list[Entry]]:
    """Group the ledger's entries by the models that ferry.toml names; a model without entries has an empty list."""
    found: dict[str, list[Entry]] = {
        f"{name}/{configuration}/{variant}": []
        for name, line in workspace.settings.lines.items()
        for configuration, variant in line.combinations()
    }
    for entry in entries:
        if entry.subject in found:
            found[entry.subject].append(entry)
    return found


def _classes(workspace: Workspace) -> list[tuple[str, str]]:
    return [(line, name) for line, settings in workspace.settings.lines.items() for name in settings.classes]


def _model(subject: str, state: SubjectState) -> ModelStanding:
    champion, newest = state.champion, max(state.judged, default=None)
    return ModelStanding(
        subject=subject, champion=state.version, since=champion.when if champion else "", who=champion.who if champion else "",
        newest=newest, outcome=str(state.judged[newest].facts["outcome"]) if newest else "",
    )  # fmt: skip


def _decisions(subject: str, state: SubjectState) -> Iterator[Waits]:
    """Yield the versions of a model on which a person must decide."""
    for version, asked in state.waiting.items():
        yield Waits(
            what=f"{subject} {version} waits for approval since {asked.when[:10]}",
            command=f"ferry approve {subject} {version} --reason ...",
        )
    newest = max(state.judged, default=0)
    if newest and newest not in {*state.waiting, *state.refused, *state.passed, state.version}:
        entry = state.judged[newest]
        outcome = entry.facts["outcome"]
        if outcome in ("promote", "promote if reasoned") and entry.facts.get("champion") == state.weights:
            why = "passed the gate" if outcome == "promote" else "needs a person's reason"
            yield Waits(what=f"{subject} {newest} {why}", command=f"ferry promote {subject} {newest} --reason ...")


def _data(workspace: Workspace, states: dict[str, SubjectState]) -> Iterator[Waits]:
    """Yield the lines whose newest data revision no model was trained on."""
    for name, line in workspace.settings.lines.items():
        md5 = recorded_md5(workspace.root, line.data)
        if md5 is None:
            yield Waits(what=f"{name} has no data yet", command=f"ferry data add {name}")
        elif not any(
            seal.data_md5 == md5 and not seal.adopted
            for subject, state in states.items() if subject.startswith(f"{name}/") for seal in state.seals.values()
        ):  # fmt: skip
            yield Waits(what=f"no model of {name} was trained on its newest data", command=f"ferry retrain {name}")


def _class(workspace: Workspace, line: str, name: str, states: dict[str, SubjectState], waits: list[Waits]) -> ClassStanding:
    """Describe a device class, and add to `waits` what a person does next about its releases."""
    target, settings = f"{line}/{name}", workspace.device_class(line, name)
    releases, policy = workspace.repository.releases(line, name), workspace.repository.rolled_out(line, name)
    wanted = _weights(line, settings, states)
    release = fielded.release_with(workspace.repository, line, name, settings.configuration, wanted) if wanted else None
    if wanted and release is None:
        waits.append(Waits(what=f"no release of {target} holds its champions", command=f"ferry release {target}"))
    elif release and (policy is None or policy.seq != release.seq):
        newest = max([policy.seq if policy else 0, *(r.seq for r in releases if policy)])
        back = f" --release {release.seq} --revert" if release.seq < newest else ""
        waits.append(
            Waits(what=f"release {release.seq} of {target} is not rolled out", command=f"ferry rollout start {target}{back}")
        )
    elif isinstance(policy, Policy2) and not policy.halt and policy.limit < BUCKETS:
        waits.append(Waits(what=f"{rollout.describe(policy)}, for {target}", command=f"ferry rollout widen {target}"))
    elif policy and policy.halt:
        waits.append(Waits(what=f"release {policy.seq} of {target} is halted", command=f"ferry rollout status {target}"))
    return ClassStanding(
        line=line, device_class=name, release=releases[-1].seq if releases else None, rolled_out=policy.seq if policy else None,
        rollout=fielded.summary(workspace.repository, line, name),
    )  # fmt: skip


def _weights(line: str, settings: DeviceClass, states: dict[str, SubjectState]) -> dict[VariantName, str]:
    """Return the champions' weights of the variants that a release of a class holds."""
    of = {variant: states[f"{line}/{settings.configuration}/{variant}"] for variant in settings.variants}
    held = of_one_full(states[f"{line}/{settings.configuration}/full"], of)
    return {variant: state.weights for variant, state in held.items()}


def _events(workspace: Workspace) -> Iterator[Waits]:
    """Yield the requests for a retraining that nobody has read, if no `ferry serve` runs."""
    if running.is_held(workspace.work, "serving"):
        return
    for _, event in triggers.waiting(workspace):
        yield Waits(what=f"{event.line} is to be retrained: {event.reason}", command="ferry serve")


def _expiries(workspace: Workspace, now: datetime) -> list[Expiry]:
    found = []
    for state in workspace.repository.states():
        rolled = (f"{line}/{name}" for line, name in _classes(workspace) if workspace.repository.rolled_out(line, name))
        renew = remedy(state).replace("LINE/CLASS", next(rolled, "LINE/CLASS")) if state.role == "rollout" else remedy(state)
        if not state.empty:
            alarm = state.expires - now < LIFETIMES[state.role] / 2
            found.append(Expiry(role=state.role, at=state.expires, alarm=alarm, command=renew))
    return sorted(found, key=lambda expiry: expiry.at)


def devices(workspace: Workspace, receive: bool = True) -> tuple[list[DeviceStanding], dict[str, str]]:
    """Receive new reports; describe every enrolled device, and say which reports were rejected.

    Args:
        workspace: of the devices.
        receive: whether new reports are received.
    """
    rejected = workspace.fleet.collect(workspace.inbox).rejected if receive else {}
    releases: dict[str, Release] = {}
    policies: dict[tuple[str, str], tuple[Policy2 | None, Policy | None]] = {}
    needs: dict[tuple[str, str], str] = {}  # agent that the release in force needs
    for line, name in _classes(workspace):
        releases |= {release.manifest: release for release in workspace.repository.releases(line, name)}
        if policy := workspace.repository.rolled_out(line, name):
            policies[line, name] = workspace.repository.policy2(line, name), workspace.repository.policy(line, name)
            if policy.manifest in releases:
                needs[line, name] = workspace.repository.manifest(releases[policy.manifest]).minimum_agent
    now = int(datetime.now(UTC).timestamp())
    return [_device(state, releases.get, policies, needs, now) for state in workspace.fleet.states()], rejected


def _device(
    state: LastState,
    release_of: Callable[[str], Release | None],
    policies: dict[tuple[str, str], tuple[Policy2 | None, Policy | None]],
    needs: dict[tuple[str, str], str],
    now: int,
) -> DeviceStanding:
    standing, where = (
        query.state_of(state),
        (state.line or state.enrolled_line or "", state.device_class or state.enrolled_class or ""),
    )
    if state.number is None:
        return DeviceStanding(
            device=state.device, heard=None, line=where[0], device_class=where[1], state=standing, tags=state.tags,
            concerns=concerns(state, now),
        )  # fmt: skip
    watched, waves = policies.get(where, (None, None))
    agent = state.agent or compatibility.OLDEST_AGENT
    policy = watched if watched and not compatibility.is_older(agent, compatibility.POLICY_2_SINCE) else waves
    runs = release_of(state.active or "")
    wave = rollout.wave_of(policy, state.device) if policy else None
    is_open = policy is not None and rollout.holds(policy, state.device, now)
    return DeviceStanding(
        device=state.device, heard=_moment(state.heard_at), line=where[0], device_class=where[1],
        event=state.event or "alive", reason=state.reason or "", runs=state.active or "", release=runs.seq if runs else None,
        wave=None if wave is None else wave + 1, waves=rollout.steps(policy) if policy else 0,
        behind=is_open and policy is not None and state.active != policy.manifest,
        agent=state.agent or compatibility.NOT_NAMED, too_old=where in needs and compatibility.is_older(agent, needs[where]),
        state=standing, heartbeat=_moment(state.heartbeat_at), tags=state.tags, concerns=concerns(state, now),
    )  # fmt: skip


def _moment(at: int | None) -> datetime | None:
    return None if at is None else datetime.fromtimestamp(at, UTC)


def concerns(state: LastState, now: int) -> dict[str, str]:
    """Say what about a device needs a person's attention, by its kind; a retired one needs none.

    Args:
        state: of the device.
        now: seconds since 1970, by the factory's clock.
    """
    found: dict[str, str] = {}
    if state.retired is not None:
        return found
    if state.confirmed is None:
        found["unconfirmed"] = f"it enrolled itself and counts once you confirm it: ferry fleet confirm {state.device}"
    if state.heartbeat_at is not None and state.heard_at is not None and now - state.heard_at > SILENT:
        found["silent"] = f"nothing was heard for {age(now - state.heard_at)}"
    if state.conflict_at is not None and now - state.conflict_at < RECENT:
        found["two copies"] = (
            f"{state.conflicts} of its reports had the number of another one: are there two copies of this device?"
        )
    if state.skew is not None and abs(state.skew) > SKEW:
        found["clock"] = f"its clock is {age(abs(state.skew))} {'ahead' if state.skew > 0 else 'behind'}"
    if state.refused_at is not None and now - state.refused_at < RECENT:
        found["refused"] = (
            f"{state.refused} of its reports were refused, the last one for its {_FOR.get(state.refused_why or '', 'content')}"
        )
    return found


_FOR = {"line": "line or class", "retired": "retirement", "signature": "signature"}


def age(seconds: float) -> str:
    """Say how long a time is, in one unit: 40 s, 12 min, 5 h, 3 d."""
    span = timedelta(seconds=max(0, int(seconds)))
    if span.days >= 2:
        return f"{span.days} d"
    if span >= timedelta(hours=2):
        return f"{int(span.total_seconds() // 3600)} h"
    return f"{span.seconds // 60} min" if span >= timedelta(minutes=2) else f"{int(span.total_seconds())} s"
