"""Passwords in addresses: what a file or a message must not show, and the environment variables that hold them instead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, TextIO
from urllib.parse import unquote

HIDDEN = "***"
_known = set[str]()
# scheme://user:password@, up to the last @ before the path; and values of query parameters that are secrets by their name
_IN_URL = re.compile(r"(?P<before>\b[a-zA-Z][\w+.-]*://[^\s:/?#@'\"]*:)(?P<secret>[^\s/'\"]*)(?=@)")
_TOKEN = re.compile(r"(?P<before>\bhttps?://)(?P<secret>[^\s:/?#@'\"]+)(?=@)")
_IN_QUERY = re.compile(
    r"(?P<before>[?&](?:ssl)?(?:password|passwd|pwd|token|secret|sig|signature|api[_-]?key|access[_-]?key|x-amz-[a-z-]+)=)"
    r"(?P<secret>[^\s&#'\"]+)", re.IGNORECASE,
)  # fmt: skip
# An address alone: SQLAlchemy takes a password that contains slashes, too.
_ADDRESS = re.compile(r"[a-zA-Z][\w+.-]*://[^:/?#@]*:(?P<secret>.*)@")


def secrets_of(address: str) -> set[str]:
    """Return the secrets in an address as they are written there: a password, a token, or the value of a parameter."""
    found = {match["secret"] for pattern in (_IN_URL, _TOKEN, _IN_QUERY) for match in pattern.finditer(address)}
    match = _ADDRESS.match(address)
    if match and not address.lower().startswith("http"):  # where a slash ends the account
        found.add(match["secret"])
    return {secret for secret in found if secret}


def remember(*addresses: str) -> None:
    """Let `hidden` remove the secrets of these addresses, however a library writes them."""
    for address in addresses:
        for secret in secrets_of(address):
            _known.update(
                word for word in (secret, unquote(secret)) if len(word) > 2
            )  # a shorter one would hide half of the text


def hidden(text: str) -> str:
    """Return a text with *** in place of every password in a URL, and of the secrets that were remembered."""
    for pattern in (_IN_URL, _TOKEN, _IN_QUERY):
        text = pattern.sub(lambda found: found["before"] + HIDDEN, text)
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def without_secrets(value: object) -> object:
    """Return a JSON value with `hidden` applied to each of its texts."""
    if isinstance(value, str):
        return hidden(value)
    if isinstance(value, dict):
        return {name: without_secrets(inner) for name, inner in value.items()}
    return [without_secrets(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def written_in(text: str) -> Iterator[str]:
    """Yield the addresses in a text, such as that of ferry.toml, that hold a secret."""
    for match in re.finditer(r"[a-zA-Z][\w+.-]*://[^\s'\"]+", text):
        if secrets_of(match[0]):
            yield match[0]


class Hiding:
    """A text stream that hides passwords in what is written to it; for tracebacks, warnings and logs of libraries."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text without its passwords."""
        self._stream.write(hidden(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts without their passwords."""
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
