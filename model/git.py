"""Run Git in a given folder, whatever the environment and the user's settings say.

Variables such as `GIT_DIR` redirect every call of Git, and of the libraries that DVC and MLflow use, to another repository.
Git sets them for hooks, and a shell may keep them. This module removes them. It also overrides user settings that would stop or
change a call made by a program, such as hooks and the encoding of messages.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from model.errors import OwnerError, RevisionError
from model.folder import shown

# Git's variables that are kept: who the user is, which files hold the settings, and how a server is reached.
KEPT = (
    "GIT_AUTHOR_", "GIT_COMMITTER_", "GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_CONFIG_NOSYSTEM", "GIT_SSH", "GIT_SSL_", "GIT_HTTP_",
    "GIT_PROXY_", "GIT_PROTOCOL", "GIT_ALLOW_PROTOCOL", "GIT_ASKPASS", "GIT_TERMINAL_PROMPT", "GIT_EXEC_PATH", "GIT_PYTHON_",
)  # fmt: skip
SETTINGS = {
    "core.hooksPath": os.devnull, "core.fsmonitor": "false", "log.showSignature": "false", "log.follow": "false",
    "i18n.commitEncoding": "UTF-8", "i18n.logOutputEncoding": "UTF-8",
}  # fmt: skip
FORMATS = {"GIT_DEFAULT_HASH": "sha1", "GIT_DEFAULT_REF_FORMAT": "files"}  # of a new repository; DVC's libraries can read these
DISTRUST = (b"detected dubious ownership", b"unsafe repository")  # Git's words, of now and of 2.35


def _redirects(name: str) -> bool:
    return name.startswith("GIT_") and not name.startswith(KEPT)


def forget_redirections() -> None:
    """Remove the variables that redirect Git to another repository from this process's environment, where libraries read them."""
    for name in filter(_redirects, [*os.environ]):
        os.environ.pop(name, None)


def run(folder: Path, *arguments: str, given: bytes = b"", around: bool = False, **variables: str) -> str:
    """Run Git in a folder and return what it prints.

    Args:
        folder: folder of the repository.
        arguments: arguments of `git`; paths are taken literally, never as patterns.
        given: bytes for Git's standard input.
        around: also accept a repository in a parent folder, if the folder has none of its own.
        variables: additional environment variables for this call.

    Returns:
        the standard output, without surrounding white space.

    Raises:
        OwnerError: Git does not trust the repository, because another user owns it.
        RevisionError: Git is missing, cannot be started or fails.
    """
    kept = {name: value for name, value in os.environ.items() if not _redirects(name)}
    environment = kept | FORMATS | {"GIT_LITERAL_PATHSPECS": "1", "LC_ALL": "C"} | variables
    if not around:
        environment["GIT_CEILING_DIRECTORIES"] = str(folder.resolve().parent)
    settings = [word for name, value in SETTINGS.items() for word in ("-c", f"{name}={value}")]
    try:
        done = subprocess.run(  # noqa: S603
            ["git", "-C", str(folder), *settings, *arguments],  # noqa: S607
            capture_output=True, check=False, input=given, env=environment,
        )  # fmt: skip
    except FileNotFoundError:
        raise RevisionError("git is not installed; install it, because data revisions are Git commits") from None
    except OSError as error:
        raise RevisionError(f"git cannot be started ({error.strerror or error}); check its installation") from error
    if done.returncode:
        if any(words in done.stderr for words in DISTRUST):
            raise _foreign(folder)
        said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        fatal = [line.partition(": ")[2] for line in said if line.startswith(("fatal: ", "error: "))]  # advice may follow
        command = next(word for word in arguments if not word.startswith("-") and "=" not in word)
        raise RevisionError(f"git {command} failed: {shown((fatal or said or ['no reason given'])[-1])}")
    return done.stdout.decode(errors="replace").strip()


def _foreign(folder: Path) -> OwnerError:
    """Build the error for a repository that Git refuses to read."""
    place = folder.resolve()
    owners = {f"user {path.stat().st_uid}" for path in (place, place / ".git") if path.exists()} - {f"user {os.geteuid()}"}
    return OwnerError(
        f"Git does not trust {shown(place)}, because it belongs to {' and '.join(sorted(owners)) or 'another user'} and not to you (user {os.geteuid()}); "
        f"run ferry as the owner, or allow it with `git config --global --add safe.directory {shown(shlex.quote(str(place)))}`"
    )
