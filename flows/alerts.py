"""Tell people what they must see: failed retrainings, refused promotions, signatures that expire; once for each change of state.

A state is kept in work/alerts.json: for each matter its present state, and the channels that have not taken it yet. What cannot
be delivered is tried again later, and never fails a run. A matter that is well from the beginning is not told.

A receiver checks a webhook as Standard Webhooks describes: the header `webhook-signature` is "v1," and the base64 of HMAC-SHA256
over `webhook-id.webhook-timestamp.body`. The key is the UTF-8 of the secret, as it is written. The id of a change stays the same
when it is sent again.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import os
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout
from pydantic import Field, TypeAdapter, ValidationError

from flows import telling
from flows.errors import WorkspaceError
from model.config import canonical_sha256
from model.scorecard import Frozen
from ota.errors import printable

if TYPE_CHECKING:
    from flows.settings import Alerts
    from flows.workspace import Workspace

SECRET = "FERRY_ALERT_SECRET"  # noqa: S105 - the variable's name
SHORTEST = 24  # characters of a secret
SECONDS = 15.0  # that one delivery may take
LOCK_SECONDS = 60.0  # that a process waits while another one delivers
LONGEST_PAUSE = 3600.0  # seconds between two attempts to deliver


class DeliveryError(Exception):
    """A channel did not take an alert."""


class Matter(Frozen):
    """A matter, its state, and what is still to be told about it."""

    state: str
    text: str
    since: str
    before: str = ""
    left: list[str] = Field(default=[], description="channels that have not taken it yet")
    tries: int = 0
    due: float = Field(default=0.0, description="Unix time of the next attempt")


Kept = TypeAdapter(dict[str, Matter])


def tell(workspace: Workspace, what: str, state: str, text: str, well: bool = False) -> None:
    """Note the state of a matter; if it has changed, tell it through the channels of ferry.toml. It never raises.

    Args:
        workspace: workspace of the matter.
        what: the matter, such as "retraining surfaces".
        state: its state in a word or two.
        text: a sentence for people.
        well: nothing is wrong; told only if something was.
    """
    settle(workspace, {what: (state, text, well)})


def settle(workspace: Workspace, states: dict[str, tuple[str, str, bool]]) -> None:
    """Note the states of several matters (state, text, whether all is well), and deliver what is due. It never raises."""
    settings = workspace.settings.alerts
    channels = [name for name, given in (("command", settings.command), ("webhook", settings.webhook)) if given]
    if not channels:
        return
    try:
        with FileLock(workspace.work / "alerts.lock", timeout=LOCK_SECONDS):
            kept = _read(_file(workspace))
            for what, (state, text, well) in states.items():
                _note(kept, what, state, text, well, channels)
            _write(_file(workspace), kept)  # before the delivery: a kill must not lose the change
            _deliver(workspace, kept, channels)
            _write(_file(workspace), kept)
    except (OSError, Timeout) as error:
        telling.tell(f"alerts cannot be kept in {_file(workspace)}: {error}")


def failed(parameters: dict[str, Any], message: str) -> None:
    """Tell that a scheduled retraining with these parameters failed. It never raises."""
    from flows.workspace import Workspace

    line = str(parameters.get("line", ""))
    try:
        workspace = Workspace(Path(str(parameters["root"])))
    except (KeyError, WorkspaceError):  # the workspace is gone
        return
    tell(workspace, f"retraining {line}", "failed", f"the retraining of {line} failed: {message}")


def check(settings: Alerts) -> None:
    """Refuse a webhook without a secret.

    Raises:
        WorkspaceError: the environment has no secret, or one that is too short.
    """
    if settings.webhook and len(os.environ.get(SECRET, "")) < SHORTEST:
        raise WorkspaceError(
            f"alerts.webhook needs a secret of {SHORTEST} characters or more in {SECRET}; `openssl rand -base64 32` makes one"
        )


def _file(workspace: Workspace) -> Path:
    return workspace.work / "alerts.json"


def _read(path: Path) -> dict[str, Matter]:
    try:
        return Kept.validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValidationError:  # damaged; it is worth no more than telling some matters again
        return {}


def _write(path: Path, kept: dict[str, Matter]) -> None:
    fresh = path.with_suffix(".tmp")
    fresh.write_bytes(Kept.dump_json(kept, indent=1))
    fresh.replace(path)


def _note(kept: dict[str, Matter], what: str, state: str, text: str, well: bool, channels: list[str]) -> None:
    known = kept.get(what)
    if (known is None and well) or (known and known.state == state):
        return
    kept[what] = Matter(
        state=state, text=printable(text, limit=2000), since=datetime.now(UTC).isoformat(timespec="seconds"),
        before=known.state if known else "", left=channels,
    )  # fmt: skip


def _deliver(workspace: Workspace, kept: dict[str, Matter], channels: list[str]) -> None:
    """Deliver what is due; the first failure of a channel ends its attempts of this call, so that a call takes limited time."""
    silent: set[str] = set()
    for what, matter in kept.items():
        left = [name for name in matter.left if name in channels]
        if not left or matter.due > time.time():
            continue
        body = _body(workspace, what, matter)
        failed = []
        for name in left:
            if name in silent:
                failed.append(name)
                continue
            try:
                _send(workspace.settings.alerts, name, body)
            except DeliveryError as error:
                telling.tell(f"an alert about {what} was not delivered by the {name} and is tried again: {error}")
                silent.add(name)
                failed.append(name)
        pause = min(LONGEST_PAUSE, 30.0 * 2**matter.tries) if failed else 0.0
        kept[what] = matter.model_copy(
            update={"left": failed, "tries": min(20, matter.tries + bool(failed)), "due": time.time() + pause if failed else 0.0}
        )


def _body(workspace: Workspace, what: str, matter: Matter) -> dict[str, str]:
    told = {"workspace": workspace.root.name, "what": what, "state": matter.state, "before": matter.before, "since": matter.since}
    return {"id": canonical_sha256(told)[:32], **told, "text": matter.text}


def _send(settings: Alerts, channel: str, body: dict[str, str]) -> None:
    payload = json.dumps(body).encode()
    if channel == "command":
        _run(settings.command, payload)
    else:
        _within(SECONDS, lambda: _post(settings.webhook, os.environ.get(SECRET, ""), body["id"], payload))


def _run(command: list[str], payload: bytes) -> None:
    """Run a command with the alert as JSON on its standard input; after `SECONDS` its whole process group is killed."""
    environment = {name: value for name, value in os.environ.items() if "AUTH_STRING" not in name}
    try:
        process = subprocess.Popen(  # noqa: S603 - the owner of ferry.toml says what to run
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env=environment,
        )  # fmt: skip
    except OSError as error:
        raise DeliveryError(f"{command[0]} cannot be started: {error.strerror or error}") from error
    try:
        process.communicate(payload, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise DeliveryError(f"{command[0]} did not end within {SECONDS:.0f} s") from None
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # what it left behind, too
        process.wait()
    if process.returncode:
        raise DeliveryError(f"{command[0]} ended with code {process.returncode}")


def _within(seconds: float, act: Callable[[], None]) -> None:
    """Call a function that may wait for a network, and wait for it no longer than this, however slowly the other side answers."""
    raised: list[Exception] = []

    def attempt() -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - it is raised where somebody waits
            raised.append(error)

    thread = threading.Thread(target=attempt, name="alert", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise DeliveryError(f"the receiver did not answer within {seconds:.0f} s")
    if raised:
        raise raised[0] if isinstance(raised[0], DeliveryError) else DeliveryError(f"{raised[0]}")


def signature(secret: str, ident: str, stamp: str, payload: bytes) -> str:
    """Compute the header `webhook-signature`."""
    signed = f"{ident}.{stamp}.".encode() + payload
    return "v1," + base64.b64encode(hmac.digest(secret.encode(), signed, hashlib.sha256)).decode()


def _post(url: str, secret: str, ident: str, payload: bytes) -> None:
    """Send an alert; redirects are not followed, because they could lead the alert elsewhere."""
    if len(secret) < SHORTEST:
        raise DeliveryError(f"{SECRET} is missing or has fewer than {SHORTEST} characters")
    parts, stamp = urlsplit(url), str(int(time.time()))
    path = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(parts.netloc, timeout=SECONDS, context=ssl.create_default_context())
    else:
        connection = http.client.HTTPConnection(parts.netloc, timeout=SECONDS)
    try:
        connection.request("POST", path, payload, {
            "Content-Type": "application/json", "User-Agent": "ferry", "webhook-id": ident, "webhook-timestamp": stamp,
            "webhook-signature": signature(secret, ident, stamp, payload),
        })  # fmt: skip
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DeliveryError(f"{parts.hostname} cannot be reached: {error}") from error
    finally:
        connection.close()
    if not 200 <= status < 300:
        raise DeliveryError(f"{parts.hostname} answered {status}")


def survey(workspace: Workspace) -> None:
    """Look at what can need a person, and tell what has changed: refused promotions and signatures. It never raises."""
    if not (workspace.settings.alerts.command or workspace.settings.alerts.webhook):
        return
    states: dict[str, tuple[str, str, bool]] = {}
    for look in (_promotions, _signatures):
        try:
            states |= look(workspace)
        except Exception as error:  # noqa: BLE001 - a store that is down is told elsewhere, and comes back
            telling.tell(f"alerts cannot look at the {look.__name__.strip('_')}: {error}")
    settle(workspace, states)


def _promotions(workspace: Workspace) -> dict[str, tuple[str, str, bool]]:
    from registry.promotion import latest_refusal

    found = {}
    for subject in workspace.subjects():
        refused = latest_refusal(workspace.ledger.entries(str(subject)))
        version = refused.facts.get("version") if refused else None
        text = f"{subject} version {version} was refused: {refused.why}" if refused else f"{subject}: no promotion is refused"
        found[f"promotion {subject}"] = (f"refused {version}" if refused else "well", text, refused is None)
    return found


def _signatures(workspace: Workspace) -> dict[str, tuple[str, str, bool]]:
    from ota.release.trust import remedy

    found: dict[str, tuple[str, str, bool]] = {}
    for role in workspace.repository.states():
        late: Any = role.expires < datetime.now(UTC)
        state = "well" if not role.alarm else "expired" if late else "expires"
        verb = "expired at" if late else "expires at"
        text = f"the signature of {role.role} {verb} {role.expires:%Y-%m-%d %H:%M} UTC; sign it with `{remedy(role)}`"
        found[f"signature {role.role}"] = (
            state,
            text if role.alarm else f"{role.role} is signed until {role.expires:%Y-%m-%d}",
            not role.alarm,
        )
    return found
