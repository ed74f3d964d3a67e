"""The agent's own metadata layer as the command line that the TUF conformance suite calls (its CLIENT-CLI.md).

`ota.agent.trust` decides everything, also about marks and limits. This module only maps our folders `metadata` and `targets` to
the suite's repository, which does not have them, and keeps the trusted files where the suite looks for them.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from ota.agent.state import Config, Home
from ota.agent.transport import Deadline, Transport, Web, at_most, download
from ota.agent.trust import LIMITS, Trust
from ota.agent.updater import FETCH_SECONDS
from ota.errors import OtaError

LIMITS.max_delegations = 8  # our delegated roles delegate no further, so the agent forbids it; the suite has trees of roles


class Suite:
    """The suite's repository with the layout of ours: `metadata/…` and `targets/…`."""

    def __init__(self, metadata: str, targets: str) -> None:
        self._places = {"metadata": Web(metadata), "targets": Web(targets)}

    @property
    def received(self) -> int:
        """See `Transport.received`."""
        return sum(place.received for place in self._places.values())

    def close(self) -> None:
        """See `Transport.close`."""
        for place in self._places.values():
            place.close()

    def read(self, name: str, offset: int = 0, deadline: Deadline | None = None) -> Iterator[bytes]:
        """See `Transport.read`."""
        kind, _, rest = name.partition("/")
        # python-tuf has quoted the names of roles already. In our layout, a target without a folder has an empty folder name.
        return self._places[kind].read(rest if kind == "metadata" else quote(rest.lstrip("/")), offset, deadline)


def home_of(folder: Path) -> Home:
    """Return the agent's home beside the suite's folder; the suite's folder is used as its metadata cache."""
    return Home(folder.with_name(f"{folder.name}.agent"))


def init(folder: Path, root: Path) -> None:
    """Set up an agent that trusts this root."""
    home, data = home_of(folder), root.read_bytes()
    home.disk.make_folder("slots")
    (home.root / "metadata").symlink_to(folder, target_is_directory=True)
    (folder / "root.json").write_bytes(data)
    home.disk.replace("root.json", data)
    config = Config(
        device="suite", line="suite", device_class="suite", repository="", root_sha256=hashlib.sha256(data).hexdigest()
    )
    home.disk.replace("config.json", config.canonical())


def fetch(home: Home, trust: Trust, transport: Transport, names: list[str], into: Path) -> None:
    """Download the targets that are not there yet, one after another.

    Raises:
        OtaError: a target is not signed, or what arrives is not what was signed.
    """
    for name in names:
        target = trust.target(name)
        if target is None:
            raise OtaError(f"nothing is signed about {name}")
        place = into / quote(name, safe="")
        if place.is_file() and hashlib.sha256(place.read_bytes()).hexdigest() == target.sha256:
            continue
        home.disk.make_folder("incoming")
        download(transport, target.published_as, target.size, home.disk, "incoming/target", at_most(FETCH_SECONDS))
        data = (home.root / "incoming" / "target").read_bytes()
        home.disk.remove("incoming/target")
        if hashlib.sha256(data).hexdigest() != target.sha256:
            raise OtaError(f"{name} does not have its signed size and hash")
        place.write_bytes(data)


def main() -> int:
    """Run one command of the suite; return exit code 1 if anything was refused, otherwise 0."""
    parser = argparse.ArgumentParser()
    for option in ("--metadata-url", "--metadata-dir", "--target-dir", "--target-base-url"):
        parser.add_argument(option, default="")
    parser.add_argument("--target-name", action="append", default=[])
    parser.add_argument("command", choices=["init", "refresh", "download"])
    parser.add_argument("root", nargs="?", default="")
    given = parser.parse_args()
    folder = Path(given.metadata_dir)
    try:
        if given.command == "init":
            init(folder, Path(given.root))
            return 0
        home, transport = home_of(folder), Suite(given.metadata_url, given.target_base_url)
        trust = Trust(home, transport)
        if given.command == "download":
            fetch(home, trust, transport, given.target_name, Path(given.target_dir))
    except OtaError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
