"""Tell a repository from what answers in its place: the login page of a network, a proxy, or another web server."""

from __future__ import annotations

import json

from ota.manifest import MAX_COUNT

PAGE = (
    "it answers with a web page in place of the repository's files, as the login page of a network or of a proxy does; open the address in a "
    "browser on this network, or let this device through"
)


def is_page(data: bytes) -> bool:
    """Tell whether an answer begins as a web page does; no file of a repository does."""
    return data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<"


def not_metadata(data: bytes) -> str:
    """Say what is wrong with an answer that should be the repository's timestamp; return an empty string if nothing is."""
    if is_page(data):
        return PAGE
    try:
        said = json.loads(data)["signed"]
        if said["_type"] == "timestamp" and 0 < said["version"] <= MAX_COUNT:
            return ""
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return "it answers, but not with the metadata of a repository; check the address that was given to `ferry-agent init`"
