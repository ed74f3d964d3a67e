"""Say what is wrong with a workspace (`ferry doctor`). The checks change nothing, and each runs whatever the others find.

It opens no `Workspace`, which needs valid settings, and loads neither MLflow nor torch.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Literal

from flows import doctor_stores
from flows.clone import RELEASING, is_clone
from flows.errors import FlowError
from flows.secrets import hidden, written_in
from flows.settings import SETTINGS, VARIABLES, Settings, read
from model.errors import ModelError, OwnerError, RevisionError
from model.git import run as git
from ota.errors import OtaError, printable
from registry.errors import RegistryError

Level = Literal["ok", "warn", "fail"]
LITTLE = 1 << 30  # bytes of free space below which there is a warning; a retraining writes more
LEAST = 100 << 20  # and below which hardly anything works
FEW_FILES = 10_000  # free inodes


@dataclass(frozen=True)
class Finding:
    """One result of a check."""

    about: str
    level: Level
    text: str


class Patient:
    """A folder that should be a workspace, with as much of it as can be read."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @cached_property
    def settings(self) -> Settings:
        """Content of ferry.toml.

        Raises:
            WorkspaceError: it is missing or wrong.
        """
        return read(self.root / SETTINGS)

    @property
    def clone(self) -> bool:
        """Whether it is a Git clone, which has neither keys nor a repository."""
        return is_clone(self.root)


def examine(root: Path) -> list[Finding]:
    """Run all checks on a folder that should be a workspace.

    Args:
        root: the folder.
    """
    patient = Patient(root)
    if not patient.root.is_dir():
        return [
            Finding("settings", "fail", f"there is no folder {printable(str(patient.root))}; name a workspace with --workspace")
        ]
    looks: list[tuple[str, bool, Callable[[Patient], Iterator[Finding]]]] = [  # the second says whether a check needs the settings
        ("settings", False, _settings), ("folder", False, _folder), ("git", False, _git), ("data", True, _data),
        ("remote", True, _remote), ("keys", False, _keys), ("signatures", False, _signatures), ("ledger", True, _ledger),
        ("mlflow", True, _mlflow), ("published", True, _published), ("packages", False, _packages), ("room", False, _room),
    ]  # fmt: skip
    found: list[Finding] = []
    wrong = False
    for about, needs, look in looks:
        if needs and wrong:
            found.append(Finding(about, "warn", f"not looked at, because {SETTINGS} cannot be read"))
            continue
        try:
            found += look(patient)
        except (FlowError, ModelError, OtaError, RegistryError) as error:
            found.append(Finding(about, "fail", str(error)))
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            found.append(
                Finding(about, "fail", f"the system refused: {where}{error.strerror or error}; check the owner and the disk")
            )
        except Exception as error:  # noqa: BLE001 - however broken a workspace is, the other checks go on
            found.append(
                Finding(about, "fail", f"it cannot be looked at ({type(error).__name__}: {error}); restore it from a backup")
            )
        wrong = wrong or (about == "settings" and any(f.level == "fail" and f.about == about for f in found))
    return [Finding(f.about, f.level, hidden(printable(f.text))) for f in found]


def _settings(patient: Patient) -> Iterator[Finding]:
    path = patient.root / SETTINGS
    if not path.is_file():
        yield Finding("settings", "fail", f"{path} is missing; restore it, or make a workspace with `ferry init`")
        return
    lines = ", ".join(patient.settings.lines)
    given = [name for name in VARIABLES.values() if os.environ.get(name)]
    yield Finding("settings", "ok", f"{path}: {lines}" + (f"; replaced by the environment: {', '.join(given)}" if given else ""))
    if any(written_in(path.read_text(encoding="utf-8"))):
        yield Finding(
            "settings", "warn",
            f"an address in {SETTINGS} holds a password, so Git does not get the file and clones lack it; give the address by an environment "
            "variable, such as FERRY_STORES_DATABASE",
        )  # fmt: skip
        if path.stat().st_mode & 0o077:
            yield Finding("settings", "fail", f"other users may read the password in {path}; run `chmod 600 {path}`")


def _folder(patient: Patient) -> Iterator[Finding]:
    root = patient.root
    places = [
        root,
        *(root / name for name in ("work", "keys", "repository", "features", "data", "mlartifacts") if (root / name).exists()),
    ]
    unusable = [path for path in places if not os.access(path, os.W_OK | os.X_OK)]
    owner = root.stat().st_uid
    if unusable:
        yield Finding("folder", "fail", f"this user may not write {unusable[0]}; run ferry as user {owner}, its owner")
    foreign = [path for path in places if path.lstat().st_uid != owner]
    if foreign:
        yield Finding("folder", "fail", f"{foreign[0]} belongs to another user than {root}; run `chown -R {owner} {foreign[0]}`")
    if not unusable and not foreign:
        yield Finding("folder", "ok", f"{root} can be written")


def _git(patient: Patient) -> Iterator[Finding]:
    root = patient.root
    if not (root / ".git").exists():
        yield Finding(
            "git", "fail", f"{root} is no Git repository, so it has no data revisions; restore .git, or run `ferry init`"
        )
        return
    names = git(root, "ls-files", "-z").split("\0")
    secret = [n for n in names if n.startswith(("keys/", "work/")) or n.endswith((".pem", ".secret"))]
    if secret:
        yield Finding(
            "git", "fail",
            f"Git holds {secret[0]}, which must stay secret; replace that key with `ferry trust rotate`, and remove the file from Git's history",
        )  # fmt: skip
    if SETTINGS in names and any(written_in((root / SETTINGS).read_text(encoding="utf-8", errors="replace"))):
        yield Finding(
            "git", "fail", f"Git holds {SETTINGS} with a password; run `git rm --cached {SETTINGS}`, and change the password"
        )
    try:
        head = git(root, "log", "-1", "--format=%h of %cs")
    except RevisionError:
        head = ""
    if head:
        yield Finding("git", "ok", f"HEAD is {head}" + (", a clone without keys" if patient.clone else ""))
    else:
        yield Finding("git", "warn", "nothing is recorded yet; record data with `ferry data add LINE`")


def _data(patient: Patient) -> Iterator[Finding]:
    from model import versions

    for name, line in patient.settings.lines.items():
        try:
            version = versions.resolve(patient.root, line.data, name)
        except RevisionError as error:
            yield Finding("data", "warn", str(error))
            continue
        if not any((patient.root / line.data).glob("*")):
            yield Finding("data", "fail", f"{line.data} is missing or empty; fetch its revision with `ferry data pull {name}`")
        else:
            yield Finding("data", "ok", f"{name} is recorded at {version.rev[:12]}, {version.files:,} files")


def _remote(patient: Patient) -> Iterator[Finding]:
    from model import versions

    stores = patient.settings.stores
    if "://" in stores.data:
        yield Finding("remote", *doctor_stores.bucket(stores.data, stores.s3_endpoint))
        return
    place = patient.root / stores.data
    recorded = {}
    for name, line in patient.settings.lines.items():
        try:
            recorded[name] = versions.resolve(patient.root, line.data, name).md5
        except (RevisionError, OwnerError):
            continue
    lacking = [name for name, md5 in recorded.items() if not (place / "files" / "md5" / md5[:2] / md5[2:]).is_file()]
    if not place.is_dir() and not recorded:
        yield Finding("remote", "ok", f"{place} is made when data are recorded")
    elif not place.is_dir() and patient.clone:
        yield Finding("remote", "warn", f"{place} is not in this clone; name where it is by FERRY_STORES_DATA")
    elif not place.is_dir():
        yield Finding(
            "remote", "fail", f"{place}, which holds the bytes of all revisions, is missing; restore it, or correct stores.data"
        )
    elif lacking:
        yield Finding(
            "remote", "fail", f"{place} lacks the data of {', '.join(lacking)}; `ferry data add {lacking[0]}` sends them"
        )
    elif not os.access(place, os.W_OK | os.X_OK):
        yield Finding("remote", "fail", f"this user may not write {place}; change its permissions")
    else:
        yield Finding("remote", "ok", f"{place} holds the last revision of each line")


def _keys(patient: Patient) -> Iterator[Finding]:
    from ota.release.keys import KeyRing
    from ota.release.repository import Repository

    root = patient.root
    if patient.clone:
        yield Finding(
            "keys", "warn", "a Git clone has no keys, so `ferry release` does not work here; retraining and evaluation do"
        )
        return
    ring = KeyRing(root / "keys")
    roles = Repository(root / "repository", ring).roles()
    missing = [role for role in (*RELEASING, "rollout") if len(ring.usable(role, roles[role].keyids)) < roles[role].threshold]
    for role in missing:
        places = ", ".join(ring.uri(role, keyid) or keyid[:8] for keyid in roles[role].keyids)
        yield Finding(
            "keys",
            "fail",
            f"the private key of {role} ({places}) cannot be used here; restore it, or `ferry trust rotate {role}`",
        )
    if ring.ledger:
        ring.sign(b"DeltaFerry ledger, a trial")
    files = [*(root / "keys").rglob("*.pem"), *(root / "keys").glob("*.secret")]
    readable = [path for path in files if stat.S_IMODE(path.stat().st_mode) & 0o077]
    if readable:
        yield Finding(
            "keys",
            "fail",
            f"other users may read {readable[0]}; run `chmod 600 {readable[0]}`, and consider `ferry trust rotate`",
        )
    if any((root / "keys" / "offline").glob("*.pem")):
        yield Finding(
            "keys",
            "warn",
            f"the offline keys are on this machine; move {root / 'keys' / 'offline'} to a medium that is not plugged in",
        )
    if not missing:
        yield Finding("keys", "ok", "every role that a command signs with has its key here")


def _signatures(patient: Patient) -> Iterator[Finding]:
    from ota.release.keys import KeyRing
    from ota.release.repository import Repository
    from ota.release.trust import remedy

    if patient.clone:
        return
    now = datetime.now(UTC)
    states = Repository(patient.root / "repository", KeyRing(patient.root / "keys")).states()
    for state in states:
        ended = state.expires < now
        if state.alarm:
            yield Finding(
                "signatures", "fail" if ended else "warn",
                f"{state.role} {'ended' if ended else 'ends'} on {state.expires:%Y-%m-%d %H:%M} UTC; sign it with `{remedy(state)}`",
            )  # fmt: skip
    first = min((state for state in states if not state.empty), key=lambda state: state.expires)
    if not any(state.alarm for state in states):
        yield Finding("signatures", "ok", f"the first to end is {first.role}, on {first.expires:%Y-%m-%d %H:%M} UTC")


def _ledger(patient: Patient) -> Iterator[Finding]:
    yield Finding("ledger", *doctor_stores.ledger(patient.root, patient.settings.stores.database, patient.clone))


def _mlflow(patient: Patient) -> Iterator[Finding]:
    stores = patient.settings.stores
    yield Finding("mlflow", *doctor_stores.mlflow(patient.root, stores.mlflow, patient.clone))
    if not patient.clone:
        for answer in doctor_stores.lost_masters(patient.root, stores.database):
            yield Finding("mlflow", *answer)


def _published(patient: Patient) -> Iterator[Finding]:
    from ota.release.copies import compare
    from ota.release.keys import KeyRing
    from ota.release.repository import Repository

    if patient.clone:
        return
    stores = patient.settings.stores
    repository = Repository(patient.root / "repository", KeyRing(patient.root / "keys"))
    if "://" in stores.publish and not stores.publish.startswith("file:"):
        level, text = doctor_stores.bucket(stores.publish, stores.s3_endpoint)
        if level == "fail":
            yield Finding("published", level, text)
            return
    theirs, ours, foreign = compare(repository, stores.publish, patient.root, stores.s3_endpoint or None)
    if foreign:
        yield Finding("published", "fail", f"{foreign} (timestamp {theirs}, here {ours}); go on in the copy that published last")
    elif not theirs:
        yield Finding("published", "ok", f"nothing is published at {stores.publish} yet")
    elif theirs < ours:
        yield Finding(
            "published", "warn", f"what is signed last is not at {stores.publish} yet; `ferry trust refresh` publishes it"
        )
    else:
        yield Finding("published", "ok", f"{stores.publish} holds what is signed last")


def _packages(patient: Patient) -> Iterator[Finding]:  # noqa: ARG001 - every check takes the patient
    problems = list(doctor_stores.packages())
    for problem in problems:
        yield Finding("packages", "fail", problem)
    if not problems:
        yield Finding("packages", "ok", "all packages that ferry needs are here, in versions that it knows")


def _room(patient: Patient) -> Iterator[Finding]:
    free = shutil.disk_usage(patient.root).free
    files = os.statvfs(patient.root)
    told = f"{free / 1e9:.1f} GB are free on the disk of {patient.root}"
    yield Finding(
        "room", "fail" if free < LEAST else "warn" if free < LITTLE else "ok", told + ("; make room" if free < LITTLE else "")
    )
    if files.f_files and files.f_favail < FEW_FILES:
        yield Finding(
            "room", "warn" if files.f_favail else "fail", f"the disk takes only {files.f_favail:,} more files; remove some"
        )


def broken(found: list[Finding]) -> bool:
    """Check whether something must be corrected; a warning is no fault."""
    return any(finding.level == "fail" for finding in found)
