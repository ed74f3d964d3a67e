"""`make conformance TUF_CONFORMANCE=checkout`: run the suite against `tuf_cli`, in a virtual environment of its own.

The environment is build/conformance/venv. The suite pins another python-tuf than we do, so it cannot run in our environment.
Without a checkout, nothing is run and a message says so.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "conformance"


def main() -> int:
    """Run the suite, and return its exit code; without a checkout, return 0."""
    checkout = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 and sys.argv[1] else None
    if checkout is None or not (checkout / "tuf_conformance").is_dir():
        sys.stdout.write("skipped: there is no checkout of theupdateframework/tuf-conformance; name one with TUF_CONFORMANCE=\n")
        return 0
    python = BUILD / "venv" / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", BUILD / "venv"], check=True)
        uv = Path(sys.executable).with_name("uv")
        subprocess.run([uv, "pip", "install", "--quiet", "--python", python, "--editable", checkout], check=True)
    entry = BUILD / "agent"
    entry.write_text(
        f'#!/bin/sh\ncd {shlex.quote(str(ROOT))} && exec {shlex.quote(sys.executable)} -m tests.conformance.tuf_cli "$@"\n'
    )
    entry.chmod(0o755)
    (BUILD / "agent.xfails").write_bytes((HERE / "xfails").read_bytes())  # where the suite looks for them
    words = [
        python,
        "-m",
        "pytest",
        "-q",
        "-c",  # otherwise it may find our settings, because the entry point lies below our root
        checkout / "pyproject.toml",
        "tuf_conformance",
        "--entrypoint",
        str(entry),
        *shlex.split(os.environ.get("PYTEST_ARGS", "")),
    ]
    return subprocess.run(words, cwd=checkout, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
