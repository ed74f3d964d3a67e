"""Git of the folder that is named, whatever the environment and the user's settings say.

`GIT_DIR` and its like lead every call of Git, and of the libraries that DVC and MLflow use, into another repository: a hook sets
them, and a shell may keep them. Here they are left out. So are the settings that would stop or change a call which a program makes:
hooks, and in what encoding a message is given back.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from model.errors import RevisionError
from model.folder import shown

# Of Git's variables those stay that say who somebody is, which files hold the settings, and how a server is reached.
KEPT = (
    "GIT_AUTHOR_", "GIT_COMMITTER_", "GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_CONFIG_NOSYSTEM", "GIT_SSH", "GIT_SSL_", "GIT_HTTP_",
    "GIT_PROXY_", "GIT_PROTOCOL", "GIT_ALLOW_PROTOCOL", "GIT_ASKPASS", "GIT_TERMINAL_PROMPT", "GIT_EXEC_PATH", "GIT_PYTHON_",
)  # fmt: skip
SETTINGS = {
    "core.hooksPath": os.devnull, "core.fsmonitor": "false", "log.showSignature": "false", "log.follow": "false",
    "i18n.commitEncoding": "UTF-8", "i18n.logOutputEncoding": "UTF-8",
}  # fmt: skip
FORMATS = {"GIT_DEFAULT_HASH": "sha1", "GIT_DEFAULT_REF_FORMAT": "files"}  # of a new repository; what DVC's libraries can read


def _redirects(name: str) -> bool:
    return name.startswith("GIT_") and not name.startswith(KEPT)


def forget_redirections() -> None:
    """Take the variables that lead to another repository out of this process's environment, for libraries that read them there."""
    for name in filter(_redirects, [*os.environ]):
        os.environ.pop(name, None)


def run(folder: Path, *arguments: str, given: bytes = b"", around: bool = False, **variables: str) -> str:
    """Call Git in a folder.

    Args:
        folder: where its repository is.
        arguments: of `git`; paths mean themselves, never patterns.
        given: what Git reads from its standard input.
        around: whether a repository that the folder lies in is meant, too, where it has none of its own.
        variables: of Git's environment, for this call.

    Returns:
        what it prints, without white space around it.

    Raises:
        RevisionError: Git is missing, or refuses.
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
        raise RevisionError("git is not installed; install it, data revisions are Git commits") from None
    except OSError as error:
        raise RevisionError(f"git cannot be started ({error.strerror or error}); check its installation") from error
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        fatal = [line.partition(": ")[2] for line in said if line.startswith(("fatal: ", "error: "))]  # advice may follow
        command = next(word for word in arguments if not word.startswith("-") and "=" not in word)
        raise RevisionError(f"git {command} failed: {shown((fatal or said or ['no reason given'])[-1])}")
    return done.stdout.decode(errors="replace").strip()
