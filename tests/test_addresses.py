"""Addresses and folders that cannot work are named when a workspace is made, and nothing is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.errors import WorkspaceError
from flows.settings import read
from flows.setup import create, template


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('publish = "published"', 'publish = ""', "stores.publish: '' names no folder; give one, such as published"),
        ('publish = "published"', 'publish = "."', "names no folder"),
        ('publish = "published"', 'publish = "keys"', "is where ferry keeps other things; name a folder of its own"),
        ('publish = "published"', 'publish = "./repository/x"', "is where ferry keeps other things"),
        ('publish = "published"', 'publish = "s3:/bucket"', "is no bucket; write it as s3://bucket/prefix"),
        ('publish = "published"', 'publish = "s3://"', "is no bucket"),
        ('publish = "published"', 'publish = "s3://a b/x"', "is no bucket"),
        ('publish = "published"', 'publish = "ftp://x/y"', "cannot be published to; give a folder or s3://bucket/prefix"),
        ('publish = "published"', 'publish = "dvc-remote/"', "publish and data are the same place"),
        ('publish = "published"', 'publish = "out\\u001b[2J"', "holds characters that cannot be printed; write it anew"),
        ('publish = "published"', 'publish = "published "', "begins or ends with a space"),
        ('data = "dvc-remote"', 'data = "S3://bucket"', "is no bucket"),
        ('reports = "inbox"', 'reports = "https://x/y"', "is an address; devices leave reports in a folder, so name one"),
        ('reports = "inbox"', 'reports = "ferry.db"', "is where ferry keeps other things"),
        (
            'mlflow = "sqlite:///mlflow.db"',
            'mlflow = "mlflow.db"',
            "is no address; write sqlite:///mlflow.db, or http(s)://host:port",
        ),
        ('mlflow = "sqlite:///mlflow.db"', 'mlflow = "http:/localhost:5000"', "is no address of a server"),
        ('mlflow = "sqlite:///mlflow.db"', 'mlflow = "http://:5000"', "is no address of a server"),
        ('mlflow = "sqlite:///mlflow.db"', 'mlflow = "http://h:99999"', "is no address of a server"),
        ('database = "sqlite:///ferry.db"', 'database = ""', "is empty; write sqlite:///ferry.db, or postgresql://..."),
        ('s3_endpoint = ""', 's3_endpoint = "localhost:9000"', "is no address of a server; write http(s)://host:port"),
        ('s3_endpoint = ""', 's3_endpoint = "http://a..b"', "is no address of a server"),
    ],
)
def test_place_that_cannot_work_is_named_and_nothing_is_made(old: str, new: str, says: str, tmp_path: Path):
    text = template(["a"])
    assert text.count(old) == 1
    with pytest.raises(WorkspaceError) as caught:
        create(tmp_path / "ws", [], text.replace(old, new))
    assert says in str(caught.value)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "ws").exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('publish = "published"', 'publish = "s3://my.bucket-1/a/b"'), ('publish = "published"', 'publish = "/srv/out side"'),
        ('publish = "published"', 'publish = "../out"'), ('publish = "published"', 'publish = "file:///srv/out"'),
        ('data = "dvc-remote"', 'data = "ssh://host/path"'), ('data = "dvc-remote"', 'data = "s3://bucket"'),
        ('mlflow = "sqlite:///mlflow.db"', 'mlflow = "https://mlflow.example:5000/x"'), ('mlflow = "sqlite:///mlflow.db"', 'mlflow = "http://[::1]:5000"'),
        ('mlflow = "sqlite:///mlflow.db"', 'mlflow = "postgresql+psycopg2://u@h/d"'), ('s3_endpoint = ""', 's3_endpoint = "http://127.0.0.1:9000"'),
        ('reports = "inbox"', 'reports = "/mnt/inbox"'),
    ],
)  # fmt: skip
def test_place_that_may_work_is_taken(old: str, new: str, tmp_path: Path):
    (tmp_path / "ferry.toml").write_text(template(["a"]).replace(old, new))
    assert read(tmp_path / "ferry.toml")
