"""Reports from where no gateway is: a folder, a stick or a bucket that devices or people fill."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from flows.errors import WorkspaceError
from flows.workspace import Workspace
from ota.errors import ManifestError, OperatorError, TransferError, printable
from ota.fleet.store import AT_ONCE, Collected
from ota.release import store
from ota.report import MAX_REPORT, DeviceReport


def ingest(workspace: Workspace, url: str) -> Collected:
    """Receive every report (`*.json`) below a URL, remove the accepted ones there, and move the rejected ones to `rejected/`.

    Args:
        workspace: whose devices.
        url: a folder, `file://...` or `s3://bucket/prefix`.

    Raises:
        WorkspaceError: there is no such folder.
        OperatorError: the URL is of another kind, or there is no such bucket.
        TransferError: the bucket or the database cannot be used; then no report is lost.
    """
    parts = urlsplit(url)
    if parts.scheme == "s3":
        with store.bucket(url, workspace.settings.stores.s3_endpoint or None) as place:
            return _from_bucket(workspace, place)
    if parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost"):
        raise OperatorError(f"cannot read reports from {url!r}; give a folder, file:///media/stick or s3://bucket/prefix")
    folder = Path(unquote(parts.path)) if parts.scheme == "file" else Path(url)
    if not folder.is_dir():
        raise WorkspaceError(f"there is no folder {printable(str(folder))}; mount the stick, or check the path")
    return workspace.fleet.collect(folder)


def _from_bucket(workspace: Workspace, place: store.Bucket) -> Collected:
    accepted: list[DeviceReport] = []
    rejected: dict[str, str] = {}
    names = [name for name in place.names() if name.endswith(".json") and "/" not in name]
    for first in range(0, len(names), AT_ONCE):
        read: dict[str, bytes] = {}
        for name in names[first : first + AT_ONCE]:
            data = place.read(name, MAX_REPORT + 1)
            if data is not None:  # somebody else took it meanwhile
                read[name] = data
        for name, result in zip(read, workspace.fleet.take([*read.values()]), strict=True):
            refused = isinstance(result, ManifestError)
            if isinstance(result, ManifestError):
                rejected[printable(name)] = str(result)
            else:
                accepted.append(result)
            try:
                if refused:
                    place.move(name, f"rejected/{name}")
                else:
                    place.remove(name)
            except TransferError as error:
                rejected[printable(name)] = f"{rejected.get(printable(name), 'it is kept')}, but cannot be removed there: {error}"
    return Collected(accepted, rejected)
