"""Whether what is signed is also published, and whether devices may read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ota.release import published, store
from ota.release.bundle import Bundle
from ota.release.repository import Repository
from tests.fleet_kit import LINE, closed_port, publish
from tests.test_policies import Factory, factory
from tests.test_release import bucket, credentials, s3_server

__all__ = ["bucket", "credentials", "factory", "s3_server"]
pytest_plugins = ("tests.fleet_kit",)


def test_rollout_status_says_whether_what_is_signed_is_published(factory: Factory):
    factory.promote("first")
    factory.release("first")
    factory.ferry("rollout", "start", LINE, "--waves", "100")
    assert factory.ferry("rollout", "status", LINE).splitlines()[-1] == "what is signed is published"
    factory.workspace.repository.refresh()
    said = factory.ferry("rollout", "status", LINE)
    assert "signed, but not published: published has timestamp" in said
    assert "`ferry trust refresh`" in said
    assert json.loads(factory.ferry("rollout", "status", LINE, "--json"))["publication"] == "behind"
    factory.ferry("trust", "refresh")
    assert "what is signed is published" in factory.ferry("rollout", "status", LINE)
    (factory.workspace.root / "published/metadata/timestamp.json").write_bytes(b"\x1b[2J")
    assert "has timestamp unknown" in factory.ferry("rollout", "status", LINE)
    (factory.workspace.root / "published/metadata/timestamp.json").unlink()
    assert "nothing is published in published, so devices do not see it" in factory.ferry("rollout", "status", LINE)


@pytest.mark.parametrize("acl", ["private", "public-read"])
def test_bucket_without_public_read_is_named(
    acl: str, repository: Repository, bundles: dict[str, Bundle], bucket: Any, s3_server: str, tmp_path: Path
):
    bucket.Acl().put(ACL=acl)
    publish(repository, bundles["first"])
    url = f"s3://{bucket.name}/devices"
    assert published.compare(repository, url, tmp_path, s3_server).state == "missing"
    store.publish(repository.files(), url, tmp_path, s3_server)
    if acl == "public-read":
        for item in bucket.objects.all():
            item.Acl().put(ACL=acl)
    found = published.compare(repository, url, tmp_path, s3_server)
    assert found.lines[0] == "what is signed is published"
    assert (f"the bucket '{bucket.name}' has no public read, so devices get 403 from it" in found.private) is (acl == "private")


def test_place_that_cannot_be_read_is_unknown(
    repository: Repository, credentials: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    found = published.compare(repository, "s3://nowhere", tmp_path, closed_port())
    assert found.state == "unknown"
    assert "whether it is published cannot be seen from here" in found.text
