"""Passwords in addresses are found and hidden in any text."""

from __future__ import annotations

import io

import pytest

from flows import secrets
from flows.secrets import Hiding, hidden, remember, secrets_of, without_secrets


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "connect to postgresql+psycopg2://ferry:hunter2@db:5432/x failed",
            "connect to postgresql+psycopg2://ferry:***@db:5432/x failed",
        ),
        ("http://:hunter2@host/", "http://:***@host/"),
        ("https://ghp_token@git.example/ws.git", "https://***@git.example/ws.git"),
        ("see https://host/file?sig=abc%2Fd&x=1.", "see https://host/file?sig=***&x=1."),
        ("postgresql://db/x?user=a&password=hunter2", "postgresql://db/x?user=a&password=***"),
        ("two: http://a:b1@c http://d:e1@f", "two: http://a:***@c http://d:***@f"),
    ],
)
def test_passwords_are_hidden(text: str, told: str):
    assert hidden(text) == told


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/prefix", "http://127.0.0.1:4200/api", "ssh://git@host/ws.git", "sqlite:////srv/ws/ferry.db", "mail me@example.org",
        "models:/shapes@champion", "http://127.0.0.1:5000/#/models/shapes@champion", "12:30 me@host",
    ],
)  # fmt: skip
def test_other_texts_stay(text: str):
    assert hidden(text) == text
    assert not secrets_of(text)


def test_remembered_secret_is_hidden_in_every_form(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(secrets, "_known", set())
    remember("postgresql://ferry:hu%40nt/er2@db/x")
    assert hidden("password hu@nt/er2 or hu%40nt/er2 is wrong") == "password *** or *** is wrong"
    assert without_secrets({"a": ["hu@nt/er2", 1, None], "b": {"c": True}}) == {"a": ["***", 1, None], "b": {"c": True}}
    stream = io.StringIO()
    hiding = Hiding(stream)
    hiding.writelines(["Traceback: hu%40", "nt/er2\n"])
    assert hiding.isatty() is False
    assert stream.getvalue() == "Traceback: ***\n"
