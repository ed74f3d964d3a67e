"""The systemd units as they are shipped: the timer is simulated, and the services run under a real systemd.

That systemd is process 1 of namespaces of its own. A mount namespace gives it `/usr/local/bin/ferry-agent`, the user
deltaferry and empty state folders; the machine keeps nothing of it.
"""

from __future__ import annotations

import configparser
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from ota.agent.beat import LEAST
from ota.report import open_line
from tests.bench.timer import PROFILES, Timer, measure
from tests.fleet_kit import Field

pytest_plugins = ("tests.fleet_kit",)

UNITS = Path(__file__).parents[1] / "infra/device"
SPANS = {"s": 1, "sec": 1, "min": 60, "h": 3600, "d": 86_400}
SYSTEMD = Path("/lib/systemd/systemd")


def unit(name: str) -> configparser.ConfigParser:
    made = configparser.ConfigParser(interpolation=None, strict=False)
    made.optionxform = str  # type: ignore[assignment,method-assign]
    made.read_string((UNITS / name).read_text())
    return made


def seconds(span: str) -> float:
    number = span.rstrip("abcdefghijklmnopqrstuvwxyz")
    return float(number) * SPANS[span.removeprefix(number)]


def test_report_timer_looks_more_often_than_a_heartbeat_can_be_due():
    timer, service = unit("ferry-agent-report.timer")["Timer"], unit("ferry-agent-report.service")["Service"]
    assert seconds(timer["OnUnitActiveSec"]) + seconds(timer["RandomizedDelaySec"]) < LEAST
    assert seconds(timer["RandomizedDelaySec"]) >= 300  # devices of a plant get power together
    assert "report --beat" in service["ExecStart"]
    others = unit("ferry-agent.service")["Service"]
    for name in ("User", "StateDirectory", "ReadWritePaths", "RestrictAddressFamilies", "ProtectSystem", "SystemCallFilter"):
        assert service[name] == others[name]


@pytest.mark.parametrize("profile", PROFILES)
def test_timer_lets_every_device_look(profile: str):
    given = unit("ferry-agent.timer")["Timer"]
    assert set(given) == {"OnBootSec", "OnUnitActiveSec", "RandomizedDelaySec"}  # what the simulation knows
    timer = Timer(
        "shipped",
        seconds(given["RandomizedDelaySec"]),
        on_boot=seconds(given["OnBootSec"]),
        every=seconds(given["OnUnitActiveSec"]),
    )
    found = measure(timer, PROFILES[profile], seed=2)
    assert found["never_looked"] == 0
    assert found["p95_wait_hours"] < 72  # a week-end
    assert found["looks_a_day"] < 10
    assert found["most_in_a_minute"] < 0.25


BOOT = """
set -e
test $$ = 1
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir -p /mnt/at /mnt/ferry /mnt/packages /mnt/python /mnt/factory/inbox /mnt/elsewhere
mount --bind {at} /mnt/at
mount --bind {project} /mnt/ferry
mount --bind {packages} /mnt/packages
mount --bind {python} /mnt/python  # which may lie in somebody's home
for folder in /run /var/lib /etc/systemd/system; do mount -t tmpfs -o mode=755 tmpfs $folder; done
for folder in /tmp /var/tmp; do mount -t tmpfs -o mode=1777,size=4M tmpfs $folder; done
mkdir -p /run/lock
for file in passwd group; do mount --bind /mnt/at/$file /etc/$file; done
mount -t overlay -o lowerdir=/mnt/at/bin:/usr/local/bin overlay /usr/local/bin  # Python may lie there, too
cp /mnt/at/units/* /etc/systemd/system/
chown deltaferry: /mnt/factory/inbox /mnt/elsewhere
(bash /mnt/at/steps > /mnt/at/told 2>&1 || true; systemctl --force --force poweroff) &
export container=unshare SYSTEMD_LOG_TARGET=null
exec {systemd} --system --unit=nothing.target
"""
PYTHON = f"/mnt/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
AGENT = f"""#!/bin/sh
PYTHONPATH=/mnt/ferry:/mnt/packages exec {PYTHON} -P -m ota.agent.cli "$@"
"""
NOTHING = "[Unit]\nDescription=Nothing by itself\nDefaultDependencies=no\n"
STEPS = """
until systemctl show-environment > /dev/null 2>&1; do sleep 0.1; done
as() {{ setpriv --reuid $1 --regid $1 --clear-groups "${{@:2}}"; }}
agent() {{ as deltaferry ferry-agent "$@"; echo "code $?"; }}
look() {{ systemctl start ferry-agent.service; echo "look $(systemctl show -P Result ferry-agent.service) $(systemctl show -P ExecMainStatus ferry-agent.service)"; }}
draw() {{
  systemctl start ferry-agent-serve.service
  as deltaferry {PYTHON} - << 'END'
import http.client, socket, time
for _ in range(200):
    try:
        asked = http.client.HTTPConnection("device")
        asked.sock = socket.socket(socket.AF_UNIX)
        asked.sock.connect("/run/deltaferry/agent.sock")
        break
    except OSError:
        time.sleep(0.1)
asked.request("POST", "/generate", '{{"caption": "bar"}}', {{"Content-Type": "application/json"}})
answer = asked.getresponse()
print("drawn", answer.status, answer.read()[1:4])
END
}}
install -d -o deltaferry -g deltaferry -m 700 /var/lib/deltaferry
agent init --device dev-1 --line shapes --class edge --repository /mnt/at/field/repository --root /mnt/at/root.json --root-sha256 {root} \\
  --reports {reports}
"""


def boots() -> bool:
    """Check whether a systemd can be started here as process 1 of new namespaces."""
    if os.geteuid() != 0 or not SYSTEMD.exists() or not all(map(shutil.which, ("unshare", "setpriv", "systemctl"))):
        return False
    return subprocess.run(["unshare", "--fork", "--pid", "--mount", "--cgroup", "true"], capture_output=True).returncode == 0


needs_systemd = pytest.mark.skipif(not boots(), reason="needs root, systemd and the right to make namespaces")


def play(at: Path, field: Field, steps: str, reports: str = "/mnt/factory/inbox") -> list[str]:
    """Boot a systemd with the shipped units, set a device up as the user deltaferry, and return what the steps print."""
    (at / "root.json").write_bytes(field.repository.root_bytes())
    (at / "units").mkdir()
    for path in UNITS.iterdir():
        shutil.copy(path, at / "units")
    (at / "units/nothing.target").write_text(NOTHING)
    for name, line in (("passwd", "deltaferry:x:64999:64999::/nonexistent:/usr/sbin/nologin"), ("group", "deltaferry:x:64999:")):
        (at / name).write_text(Path("/etc", name).read_text() + line + "\n")
    (at / "bin").mkdir()
    (at / "bin/ferry-agent").write_text(AGENT)
    (at / "bin/ferry-agent").chmod(0o755)
    root = hashlib.sha256(field.repository.root_bytes()).hexdigest()
    (at / "steps").write_text(STEPS.format(PYTHON=PYTHON, root=root, reports=reports) + steps)
    (at / "boot").write_text(BOOT.format(
            at=at, project=Path(__file__).parents[1], packages=sysconfig.get_paths()["purelib"], python=sys.base_prefix, systemd=SYSTEMD,
        ))  # fmt: skip

    subprocess.run(["chmod", "-R", "a+rX", str(at)], check=True)
    words = [
        "unshare",
        "--fork",
        "--kill-child",
        "--pid",
        "--mount-proc",
        "--mount",
        "--cgroup",
        "--uts",
        "--ipc",
        "bash",
        str(at / "boot"),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (at / "told").exists(), done.stderr
    told = (at / "told").read_text()
    assert "ferry fleet enroll dev-1" in told, told + done.stderr
    return told.partition("\ncode 0\n")[2].splitlines()


@pytest.mark.slow
@needs_systemd
def test_device_under_the_shipped_units_updates_draws_and_reports(scene: Field, tmp_path: Path):
    told = play(
        tmp_path, scene,
        """
        systemctl start ferry-agent.timer && systemctl show -P ActiveState ferry-agent.timer
        look
        agent status
        draw
        cp /mnt/factory/inbox/* /mnt/at/
        look
        """,
    )  # fmt: skip
    assert told[:2] == ["active", "look success 0"]
    assert told[2].startswith("dev-1 runs release 1 of shapes")
    assert told[2].endswith("sound")
    assert told[3:] == ["code 0", "drawn 200 b'PNG'", "look success 0"]
    events = [open_line(path.read_bytes()).report.event for path in sorted(tmp_path.glob("dev-1-*.json"))]
    assert events == ["starting", "installed", "confirmed"]


@pytest.mark.slow
@needs_systemd
def test_reports_that_the_unit_may_not_write_are_seen(scene: Field, tmp_path: Path):
    told = play(
        tmp_path, scene,
        """
        look
        agent status
        agent doctor --no-draw | grep -v '^ok'
        agent report
        agent status
        ls /mnt/elsewhere | wc -l
        """,
        reports="/mnt/elsewhere",
    )  # fmt: skip
    assert told[0] == "look success 0"
    assert told[1].startswith("dev-1 runs release 1 of shapes")
    assert told[2].startswith("3 reports wait to be delivered: reports cannot be left in /mnt/elsewhere: ")
    assert "Read-only file system" in told[2]
    assert "(systemd lets a service write what its unit names in ReadWritePaths)" in told[2]
    assert any(line.startswith("fail  reports") and "ReadWritePaths" in line for line in told)
    assert told[-5:-2] == ["all reports are delivered", "code 0", told[1]]
    assert told[-1] == "3"


@pytest.mark.slow
@needs_systemd
def test_root_leaves_nothing_that_the_service_cannot_use(scene: Field, tmp_path: Path):
    told = play(
        tmp_path, scene,
        """
        look
        for command in update rollback report 'forget ab' 'generate -o /mnt/at/a.png' bench; do ferry-agent $command; echo "code $?"; done
        find /var/lib/deltaferry ! -user deltaferry
        look
        """,
    )  # fmt: skip
    refused = "ferry-agent: /var/lib/deltaferry belongs to deltaferry, and this is root; run the agent as deltaferry, with `sudo -u deltaferry "
    assert told[0] == told[-1] == "look success 0"
    assert len([line for line in told if line.startswith(refused)]) >= 4
    assert not [line for line in told if line.startswith("/var/lib/deltaferry")]  # what `find` found
    for i in range(1, 9, 2):
        assert (told[i].startswith(refused), told[i + 1]) == (True, "code 3")


@pytest.mark.slow
@needs_systemd
def test_full_temporary_folders_stop_neither_updates_nor_images(scene: Field, tmp_path: Path):
    told = play(
        tmp_path, scene,
        """
        for folder in /tmp /var/tmp; do cat /dev/zero > $folder/full 2> /dev/null; done
        look
        draw
        agent bench --images 20 --no-joules --json | cut -c1-10
        agent doctor | grep '^fail'
        """,
    )  # fmt: skip
    assert told == ["look success 0", "drawn 200 b'PNG'", "full: 20 images", '{"bundle":', "code 0"]


@pytest.mark.slow
@needs_systemd
def test_services_tell_systemd_and_are_restarted_when_they_hang(scene: Field, tmp_path: Path):
    told = play(
        tmp_path, scene,
        """
        look
        for name in run serve; do
          systemctl start ferry-agent-$name.service && systemctl show -P ActiveState ferry-agent-$name.service
        done
        until systemctl show -P StatusText ferry-agent-serve.service | grep -q '^draws with'; do sleep 0.1; done
        systemctl show -P StatusText ferry-agent-run.service
        systemctl show -P ActiveState ferry-agent.timer
        for name in run serve; do
          mkdir -p /run/systemd/system/ferry-agent-$name.service.d
          printf '[Service]\nWatchdogSec=2\nRestart=no\n' > /run/systemd/system/ferry-agent-$name.service.d/short.conf
        done
        systemctl daemon-reload
        for name in run serve; do
          systemctl restart ferry-agent-$name.service
          kill -STOP $(systemctl show -P MainPID ferry-agent-$name.service)
          until [ "$(systemctl show -P ActiveState ferry-agent-$name.service)" = failed ]; do sleep 0.1; done
          systemctl show -P Result ferry-agent-$name.service
        done
        """,
    )  # fmt: skip
    assert told == ["look success 0", "active", "active", "waits for its first check", "inactive", "watchdog", "watchdog"]
