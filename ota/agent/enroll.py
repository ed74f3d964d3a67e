"""Enrolment: the device shows the factory its public key, with a token that an operator gave it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from pydantic import ValidationError

from ota.agent import reports
from ota.agent.channel import Gateway, Said, place_of
from ota.agent.network import LaterError
from ota.agent.state import Home
from ota.errors import OperatorError, TransferError
from ota.report import Enrolment

LOCK_WAIT = 60.0  # seconds to wait for an update that goes on
MAX_TOKEN = 4096  # bytes read of the token's file
UNUSABLE = "does not hold one token; ask the factory's operator for the file that `ferry fleet invite` wrote"
NO_GATEWAY = (
    "this device reports to no gateway, so it cannot be enrolled from here; give the gateway's address with `ferry-agent init --reports`, or "
    "let the operator run `ferry fleet enroll` with the key that `ferry-agent doctor` shows"
)


def token_in(path: Path) -> str:
    """Read the token that a file holds; no message shows it.

    Raises:
        OperatorError: the file cannot be read, or holds something else.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_TOKEN).decode("ascii", "replace").strip()
    except OSError as error:
        raise OperatorError(f"cannot read {path}: {error.strerror}; give the file with the token") from error
    if not 16 <= len(text) <= 128 or not text.replace("-", "").replace("_", "").isalnum() or not text.isascii():
        raise OperatorError(f"{path} {UNUSABLE}")
    return text


def enroll(home: Home, token: str) -> bool:
    """Enrol this device with a token; return whether it counts in rollouts already, or waits for the operator's confirmation.

    Where the factory has reports of this device from before it got a new key, this device counts on from their highest number.

    Raises:
        BusyError: another agent changes the directory; the token was not used.
        OperatorError: there is no gateway, or the factory does not accept the token.
        TransferError: the gateway is not reached, or is too busy.
        StateError: the device's key is lost.
    """
    config = home.config()
    place = place_of(config.reports) if config.reports else None
    if place is None or isinstance(place, Path):
        raise OperatorError(NO_GATEWAY)
    named = (config.device, config.line, config.device_class)
    try:
        wanted = Enrolment(
            device=config.device, line=config.line, device_class=config.device_class, public_key=reports.public_key(home), token=token,
            signature=reports.signed(home, Enrolment.message(token, *named)),
        )  # fmt: skip
    except ValidationError:
        raise OperatorError(f"the token's file {UNUSABLE}") from None  # the foreign error quotes the token
    with home.locked(LOCK_WAIT), closing(Gateway(place, config.authorities)) as gateway:
        try:
            said = gateway.ask("v1/enroll", wanted.canonical(), {"Content-Type": "application/json"})
        except LaterError as error:
            raise TransferError(
                f"the gateway takes no enrolment now; try again in {max(1, round(error.seconds))} s with the same token"
            ) from error
        confirmed = _confirmed(said, config.device)
        highest = said.fields().get("highest")  # gateways of before do not say it
        if isinstance(highest, int) and not isinstance(highest, bool):
            reports.go_on_from(home, highest)
    return confirmed


def _confirmed(said: Said, device: str) -> bool:
    """Read the answer to an enrolment."""
    found = said.fields()
    if said.status == 200 and found.get("device") == device and isinstance(found.get("confirmed"), bool):
        return bool(found["confirmed"])
    if said.status == 403 and found:
        raise OperatorError(
            "the factory does not accept the token: it is wrong or has expired, or it is for another device, line or class; ask its operator "
            "for a new one with `ferry fleet invite`"
        )
    if said.status == 409:
        raise OperatorError(
            f"the token was used before, or the factory knows {device} already; ask its operator for a new token or, if this device has a new "
            "key, for `ferry fleet rekey`"
        )
    if said.status in (400, 404, 405, 413, 422):
        raise OperatorError(
            f"what answers at the address of --reports takes no enrolment (status {said.status}); check the address, and give gateway and agent "
            "the newest version"
        )
    raise TransferError(
        f"the answer to the enrolment is not that of a gateway (status {said.status}), but perhaps a proxy's page; check the address of --reports, "
        "then try again"
    )


def told(device: str, confirmed: bool) -> str:
    """Say how an enrolment ended."""
    if confirmed:
        return f"{device} is enrolled; `ferry-agent report` sends what waits"
    return f"{device} is enrolled, and its reports are taken; it counts in rollouts once the operator has confirmed it"
