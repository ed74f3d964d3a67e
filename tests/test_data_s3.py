"""The commands of `ferry data` with the bytes in S3: the server runs in a process of its own, on a free loopback port."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest

from model import versions

from .conftest import write_images

pytestmark = pytest.mark.slow

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true", "AWS_MAX_ATTEMPTS": "1",
}  # fmt: skip


def ferry(root: Path, *words: str, code: int = 0) -> Any:
    """Run `ferry data` and return its answer, or what it prints on stderr if it refuses."""
    command = [sys.executable, "-m", "flows.cli", "--quiet", "-w", str(root), "data", *words, "--json"]
    told = subprocess.run(command, env=os.environ | CREDENTIALS, capture_output=True, text=True)
    assert told.returncode == code, told.stderr
    assert "Traceback" not in told.stderr
    return json.loads(told.stdout) if code == 0 else told.stderr


def forget(root: Path) -> None:
    """Delete all that this machine has, except Git's history and the data folder."""
    for kept in (".dvc/cache", "work/sketches", "work/data"):
        shutil.rmtree(root / kept, ignore_errors=True)


def test_data_live_in_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", "0"], stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr
        address = next(line.split()[-1] for line in server.stderr if "Running on http" in line)
        bucket = boto3.resource(
            "s3", endpoint_url=address, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
        ).Bucket("parts")
        bucket.create()
        root = tmp_path / "ws"
        made = subprocess.run([sys.executable, "-m", "flows.cli", "init", str(root), "--line", "shapes"], capture_output=True)
        assert made.returncode == 0, made.stderr
        settings = (root / "ferry.toml").read_text()
        settings = settings.replace('data = "dvc-remote"', 'data = "s3://parts/factory"')
        (root / "ferry.toml").write_text(settings.replace('s3_endpoint = ""', f's3_endpoint = "{address}"'))
        folder = write_images(root / "data/shapes", 12)
        first = ferry(root, "add", "shapes", "-m", "first")
        write_images(folder, 12, seed=1, dim=True)
        second = ferry(root, "add", "shapes", "-m", "dim ones")
        listed = versions.files(root, versions.resolve(root, "data/shapes", "shapes"))
        assert {o.key.removeprefix("factory/files/md5/").replace("/", "") for o in bucket.objects.all()} >= set(listed.values())

        forget(root)  # the bucket alone delivers both
        told = ferry(root, "diff", "shapes", first["rev"])
        assert (len(told["changes"]["added"]), told["changes"]["changed"]) == (12, ["metadata.jsonl"])
        assert ferry(root, "status", "shapes")["remote_lacks"] == []

        clone = tmp_path / "clone"  # which has the address of the bucket from Git
        subprocess.run(["git", "clone", "--quiet", str(root), str(clone)], check=True)
        assert ferry(clone, "pull", "shapes")["rev"] == second["rev"]
        assert versions.folder_md5(clone / "data/shapes") == versions.folder_md5(folder)
        shutil.rmtree(clone)

        key = f"factory/files/md5/{listed['003.png'][:2]}/{listed['003.png'][2:]}"
        whole = bucket.Object(key).get()["Body"].read()
        bucket.Object(key).put(Body=bytes(len(whole)))
        forget(root)
        assert "restore" in ferry(root, "diff", "shapes", first["rev"], code=3)
        bucket.Object(key).delete()
        assert ferry(root, "status", "shapes")["remote_lacks"] == ["003.png"]
        assert "cannot be fetched" in ferry(root, "diff", "shapes", first["rev"], code=3)
        assert ferry(root, "add", "shapes")["rev"] == second["rev"]  # sends it again
        assert bucket.Object(key).get()["Body"].read() == whole
    finally:
        server.kill()
        server.communicate()
    said = ferry(root, "status", "shapes")
    assert (said["dirty"], said["remote_lacks"]) == (False, None)
    assert said["remote_error"].startswith("the DVC remote cannot be asked: ")
    write_images(folder, 4, seed=2)
    assert ferry(root, "add", "shapes", code=3).splitlines()[-1].startswith("ferry: ")
    assert [row["rev"] for row in ferry(root, "log", "shapes")["revisions"]] == [second["rev"], first["rev"]]
