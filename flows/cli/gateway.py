"""`ferry gateway`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.shared import open_workspace, reported_errors


def gateway(
    host: Annotated[
        str | None, typer.Option(show_default=False, help="Address to listen at; that of ferry.toml by default.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65_535, show_default=False, help="Port to listen at; that of ferry.toml by default; 0: any free one."
        ),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(show_default=False, help="Certificate chain, as PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(show_default=False, help="The certificate's private key, as PEM.")] = None,
    insecure_bind: Annotated[
        bool, typer.Option("--insecure-bind", help="Listen beyond the loopback without TLS, because a proxy adds it.")
    ] = False,
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDRESS", show_default=False, help="Proxy whose X-Forwarded-For is believed; repeat for several."),
    ] = None,
    access_log: Annotated[bool, typer.Option("--access-log", help="Write a line for each request.")] = False,
) -> None:
    """Serve devices: the published repository, reports, enrolments.

    It runs until stopped, holds no key and signs nothing. The section [gateway] of ferry.toml has the same settings. On SQLite one
    gateway runs; several share PostgreSQL.
    """
    with reported_errors():
        workspace = open_workspace()
        from flows import gateway as devices

        at = devices.place(
            workspace, host=host, port=port, certificate=tls_cert, key=tls_key, insecure_bind=insecure_bind or None,
            proxies=tuple(trusted_proxy) if trusted_proxy else None,
        )  # fmt: skip
        words, environment = devices.command(workspace, at, access_log)
        if devices.published(workspace) is None:
            typer.echo(
                f"the repository is published to {workspace.settings.stores.publish}, so devices fetch it there, not here",
                err=True,
            )
        devices.become(words, environment)
