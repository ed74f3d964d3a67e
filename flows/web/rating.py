"""Ask people which of two versions draws the better image: draw the pairs, and show them here or in a file.

The answer sheet says which version drew which image. It stays in `ratings/` of the workspace, and the page that raters see does
not contain it.
"""

from __future__ import annotations

import random
import secrets
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from flows import progress
from flows.errors import BusyError, ServerError
from flows.web.app import application, body_of, serving
from flows.workspace import Workspace
from model.scorecard import Scorecard
from ota import output
from registry import rating
from registry.catalog import Subject
from registry.errors import RatingError, RegistryError
from registry.rating import MAX_ANSWERS, Sheet
from registry.seal import Seal
from registry.sheets import couple, keep

BATCH = 32
HEADERS = {
    "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin",
    "Content-Security-Policy": f"{rating.POLICY}; frame-ancestors 'none'",
}  # fmt: skip
HOSTS = ("127.0.0.1", "localhost")


def prepare(workspace: Workspace, subject: str, version: int | None, against: int | None, pairs: int) -> tuple[Sheet, str]:
    """Deal a sheet, draw its images and write the answer sheet; return the sheet and the page.

    Args:
        workspace: whose versions.
        subject: LINE/CONFIG/VARIANT.
        version: version to rate; None: the newest if it is newer than the champion, otherwise the champion.
        against: version to compare with; None: the champion, or for the champion itself the last one before it.
        pairs: number of pairs.

    Raises:
        CatalogError: there are no two versions to compare.
        RatingError: both are the same version, there are too few pairs, or the scorecard lists no captions.
        WorkspaceError: there is no such line.
    """
    asked = Subject.parse(subject)
    workspace.line(asked.line)
    challenger, before = couple(workspace, asked, version, against)
    cards = [workspace.catalog.card(v) for v in (challenger, before)]
    sheet = rating.deal(
        secrets.token_hex(16), subject, challenger.version, before.version, [row.caption for row in cards[0].captions], pairs,
        random.SystemRandom(),
    )  # fmt: skip
    drawn = [_draw(workspace, v, card, sheet) for v, card in zip((challenger, before), cards, strict=True)]
    sides = [(a, b) if left else (b, a) for a, b, left in zip(*drawn, sheet.challenger_left, strict=True)]
    workspace.ratings.mkdir(exist_ok=True)
    _save(workspace.ratings / f"{sheet.id}.json", sheet.model_dump_json(indent=1))
    return sheet, rating.page(sheet, sides)


def _draw(workspace: Workspace, version: Seal, card: Scorecard, sheet: Sheet) -> list[bytes]:
    """Draw a version's image of each pair in the session that devices use, and return the images as PNG."""
    import torch

    from model import session
    from model.data import to_bytes

    opened = session.load(workspace.catalog.files(version, "bundle", workspace.work / "champions"))
    ids, made = opened.encode(sheet.captions), []
    for first in range(0, len(sheet.seeds), BATCH):
        seeds = sheet.seeds[first : first + BATCH]
        images, _ = opened.generate(ids[first : first + len(seeds)], seeds, card.sampler)
        made += [_png(image) for image in to_bytes(torch.nan_to_num(images))]
        progress.advance(f"draw {version.name}", len(made), len(sheet.seeds))
    return made


def _png(image: Any) -> bytes:
    """Encode a picture, uint8 [C, R, R], as PNG."""
    pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(workspace: Workspace, sheet: Sheet, page: str) -> Path:
    """Write the page to a file that can be sent to raters, and return its path."""
    path = workspace.ratings / f"{sheet.id}.html"
    _save(path, page)
    return path


def _save(path: Path, text: str) -> None:
    with output.fresh(path) as file:
        file.write(text.encode())


@contextmanager
def server(workspace: Workspace, sheet: Sheet, page: str, port: int = 0) -> Iterator[str]:
    """Show a sheet on the loopback interface and record the answers that come back, as long as the block lasts.

    Only requests that name this host and port are served, and only the page itself may send answers. So another page in the
    rater's browser can neither read the sheet nor answer it. The path is random and is written nowhere, so other users of the
    machine do not know it. The sheet's id would not be secret, because it is the name of a file.

    Yields:
        the address to open.

    Raises:
        ServerError: the port cannot be used.
    """
    workspace.ledger.head()  # opens the ledger here, so that two requests do not open it at once
    path = f"/{secrets.token_urlsafe(16)}/"
    with ExitStack() as life:
        try:
            host, found = life.enter_context(serving(_application(workspace, sheet, page, path), HOSTS[0], port))
        except OSError as error:
            raise ServerError(
                f"the page cannot be shown at port {port}: {error.strerror or error}; choose another --port"
            ) from error
        yield f"http://{host}:{found}{path}"


def wait() -> None:
    """Wait until somebody presses Ctrl-C."""
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        return


def _application(workspace: Workspace, sheet: Sheet, page: str, path: str) -> ASGIApp:
    """Build the application that serves the page at one path, and takes answers at another."""

    async def show(_: Request) -> Response:
        return HTMLResponse(page)

    async def take(request: Request) -> Response:
        data = await body_of(request, MAX_ANSWERS)
        if request.headers.get("origin") != f"http://{request.headers['host']}":
            raise HTTPException(403, "only the page itself may send answers; open it again")
        try:
            await run_in_threadpool(keep, workspace, sheet, rating.read(data))
        except RatingError as error:
            raise HTTPException(400, str(error)) from error
        except (RegistryError, BusyError) as error:
            raise HTTPException(503, str(error)) from error
        return PlainTextResponse("Your answers are kept. Thank you.")

    return application(
        [Route(path, show), Route(f"{path}answers", take, methods=["POST"])],
        "there is nothing here; open the address that `ferry rate --serve` printed",
        HEADERS,
        HOSTS,
    )
