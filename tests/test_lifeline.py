"""Nothing outlives the ferry that started it, and no other process is ended in its place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flows import lifeline, watchers
from flows.errors import ServerError
from flows.setup import create
from tests.test_slow import clean_environment, wait_for

# A ferry that starts a server, and is killed. The server tells its process id, and waits for the end of its ferry.
FERRY = """
import os, subprocess, sys
end, mine = os.pipe()
server = subprocess.Popen(
    [sys.executable, "-c", "from flows import lifeline; lifeline.hold_on(); import time; time.sleep(600)", "flows.serve:app"],
    pass_fds=[end], env=os.environ | {"FERRY_LIFELINE": str(end)}, start_new_session=True, stdout=subprocess.DEVNULL,
)
print(server.pid, flush=True)
import time; time.sleep(600)
"""
SLEEPER = "import time; time.sleep(600)"
RUN = """
import os, subprocess, sys
from flows import lifeline
run = subprocess.Popen(
    [sys.executable, "-c", "from flows import lifeline; lifeline.end_with_ferry(); import time; time.sleep(600)"],
    env=os.environ | {"FERRY_SERVED_BY": lifeline.me()}, start_new_session=True, stdout=subprocess.DEVNULL,
)
print(run.pid, flush=True)
import time; time.sleep(600)
"""


def ended(process: int) -> bool:
    """Wait until a process that is not our child has ended."""
    try:
        psutil.Process(process).wait(timeout=60)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        os.kill(process, signal.SIGKILL)
        return False
    return True


@pytest.mark.parametrize("program", [FERRY, RUN])
def test_child_ends_when_its_ferry_is_killed(program: str):
    ferry = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert ferry.stdout
    child = int(ferry.stdout.readline())
    ferry.stdout.close()
    assert psutil.pid_exists(child)
    ferry.kill()
    ferry.wait()
    assert ended(child)


def test_server_that_an_older_ferry_left_is_ended_and_nothing_else(tmp_path: Path):
    """Record four processes: an orphan, the server of a living ferry, another program, and a number that was given again."""
    (tmp_path / lifeline.RECORDS).mkdir()
    started = [
        subprocess.Popen([sys.executable, "-c", SLEEPER, *words])
        for words in (["flows.serve:app"], ["flows.serve:app"], [], ["flows.serve:app"])
    ]
    wait_for(lambda: all(lifeline.started(p.pid) and lifeline.MARK in Path(f"/proc/{p.pid}/cmdline").read_bytes() for p in (started[0], started[1], started[3])), started[0])  # type: ignore[arg-type]  # fmt: skip
    gone = {"pid": 2**22 - 3, "started": 1, "boot": lifeline._boot()}
    for process, ferry, server in zip(
        started, (gone, lifeline._named(os.getpid()), gone, gone), map(lifeline._named, [p.pid for p in started]), strict=True
    ):
        record = {"server": server | ({"started": 5} if process is started[3] else {}), "ferry": ferry}
        (tmp_path / lifeline.RECORDS / f"{process.pid}.json").write_text(json.dumps(record))
    (tmp_path / lifeline.RECORDS / "damaged.json").write_text("{")
    try:
        reaping = threading.Thread(target=started[0].wait)  # an orphan's parent is init, which reaps it
        reaping.start()
        assert lifeline.end_orphans(tmp_path) == [started[0].pid]
        reaping.join()
        assert [p.poll() is None for p in started] == [False, True, True, True]
        assert [path.stem for path in (tmp_path / lifeline.RECORDS).iterdir()] == [str(started[1].pid)]
        assert lifeline.end_orphans(tmp_path) == []
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["serve", "retrain", "release"])
def test_killed_ferry_leaves_no_server(command: str, tmp_path: Path):
    """Start the real server as each command does, kill the ferry, and see that the server ends."""
    workspace = create(tmp_path / "ws", ["shapes"])
    start = {
        "serve": "with serve.server(w) as at: print('up', flush=True); import time; time.sleep(600)",
        "retrain": "serve.start_in_process(w); print('up', flush=True); import time; time.sleep(600)",
    }
    program = f"import sys; from pathlib import Path; from flows import serve; from flows.workspace import Workspace; w = Workspace(Path(sys.argv[1]))\n{start.get(command, start['retrain'])}"  # fmt: skip
    ferry = subprocess.Popen(
        [sys.executable, "-c", program, str(workspace.root)], stdout=subprocess.PIPE, text=True, env=clean_environment()
    )
    assert ferry.stdout
    assert ferry.stdout.readline() == "up\n"
    servers = [p.pid for p in psutil.Process(ferry.pid).children(recursive=True)]
    assert servers
    ferry.stdout.close()
    ferry.kill()
    ferry.wait()
    assert all(map(ended, servers))
    assert lifeline.end_orphans(workspace.work / "prefect") == []


def test_watcher_that_dies_begins_again(capfd: pytest.CaptureFixture[str]):
    ending, looked, well = threading.Event(), [], threading.Event()

    def look() -> None:
        looked.append(1)
        if len(looked) < 3:
            raise SystemExit(1)  # which ends a thread without a word
        well.set()
        ending.wait()

    with watchers.watching("aliases", look, ending, pause=0):
        assert well.wait(60)
    assert len(looked) == 3
    assert capfd.readouterr().err.count("the watcher of aliases ended (SystemExit: 1); it begins again") == 2


@pytest.mark.parametrize("look", [lambda: None, lambda: os.fsencode(3)])
def test_watcher_that_keeps_dying_ends_ferry_visibly(look: Callable[[], object], capfd: pytest.CaptureFixture[str]):
    caught = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: caught.set())
    try:
        with pytest.raises(ServerError, match="the watcher of aliases ended 5 times"), watchers.watching("aliases", look, threading.Event(), pause=0):  # type: ignore[arg-type]  # fmt: skip
            assert caught.wait(60)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capfd.readouterr().err.count("begins again") == 4
