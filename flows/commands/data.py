"""`ferry data`."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.shared import Json, answer, open_workspace, showing_progress, told_errors
from model.errors import ModelError

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Data revisions: DVC keeps the bytes, Git their hashes.")


@data_app.command("add")
def data_add(
    line: Annotated[str, typer.Argument(help="Whose data folder to record.")],
    message: Annotated[str, typer.Option("--message", "-m", help="What is new.")] = "new data",
    as_json: Json = False,
) -> None:
    """Check a line's data folder and record it as a revision.

    Images and captions that cannot be used are listed; they are recorded all the same but never trained on.
    """
    with told_errors():
        from flows import progress
        from model import data, versions

        workspace = open_workspace()
        settings = workspace.line(line)
        with showing_progress():
            usable, held_out, bad = data.check(
                workspace.root / settings.data, settings.text_length,
                lambda done, total: progress.advance(f"check {line}", done, total),
            )  # fmt: skip
        if not usable:
            name, why = next(iter(bad.items()))
            raise _data_error(f"not one image in {settings.data} can be used, the first: {name} {why}")
        for name, why in bad.items():
            typer.echo(f"{name} {why}", err=True)
        if held_out < settings.gate.minimum_images:
            typer.echo(
                f"only {held_out} images are held out for evaluation, the gate of {line} wants {settings.gate.minimum_images}: add more "
                "images (or groups), or lower gate.minimum_images in ferry.toml and know less",
                err=True,
            )
        with workspace.locked("data"), showing_progress():
            progress.advance("record and push", 0, 1)
            versions.init(workspace.root, workspace.data_remote, workspace.settings.stores.s3_endpoint)  # as ferry.toml says now
            version = versions.add(workspace.root, settings.data, line, message)
            progress.advance("record and push", 1, 1)
        answer(
            as_json, version.model_dump() | {"usable": usable, "held_out": held_out, "unusable": bad},
            f"{line} is at {version.rev[:12]}: {usable} usable images, {held_out} of them held out"
            f"{f', {len(bad)} files that cannot be used' if bad else ''}",
        )  # fmt: skip


def _data_error(message: str) -> ModelError:
    from model.errors import DataError

    return DataError(message)


@data_app.command("log")
def data_log(line: Annotated[str, typer.Argument(help="Whose revisions.")], as_json: Json = False) -> None:
    """List a line's data revisions, newest first."""
    with told_errors():
        from model import versions

        workspace = open_workspace()
        rows = versions.log(workspace.root, workspace.line(line).data, line)
        answer(
            as_json, {"revisions": [v.model_dump() | {"message": m} for v, m in rows]},
            "\n".join(f"{v.rev[:12]}  {v.files:6d} files  {v.bytes:>12,} bytes  {m}" for v, m in rows) or "no revision yet",
        )  # fmt: skip
