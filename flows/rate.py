"""Ask people which of two versions draws the better image: draw the pairs, show them here or in a file, record the answers.

The answer sheet says which version drew which image. It stays in `ratings/` of the workspace, and the page that raters see does
not contain it.
"""

from __future__ import annotations

import random
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any, cast

from PIL import Image
from pydantic import ValidationError

from flows import progress
from flows.errors import BusyError
from flows.workspace import Workspace
from model.scorecard import Scorecard
from ota import output
from registry import rating
from registry.catalog import Subject
from registry.champions import champion_of, judged, promotions, sealed
from registry.errors import CatalogError, RatingError, RegistryError
from registry.rating import MAX_ANSWERS, Answers, Rated, Sheet, Verdict
from registry.seal import Seal

BATCH = 32
REQUEST_SECONDS = 30.0


def prepare(workspace: Workspace, subject: str, version: int | None, against: int | None, pairs: int) -> tuple[Sheet, str]:
    """Deal a sheet, draw its images and write the answer sheet; return the sheet and the page.

    Args:
        workspace: whose versions.
        subject: LINE/CONFIG/VARIANT.
        version: version to judge; None: the newest if it is newer than the champion, otherwise the champion.
        against: version to compare with; None: the champion, or for the champion itself the last one before it.
        pairs: number of pairs.

    Raises:
        CatalogError: there are no two versions to compare.
        RatingError: both are the same version, there are too few pairs, or the scorecard lists no captions.
        WorkspaceError: there is no such line.
    """
    asked = Subject.parse(subject)
    workspace.line(asked.line)
    challenger, before = _couple(workspace, asked, version, against)
    cards = [workspace.catalog.card(v) for v in (challenger, before)]
    sheet = rating.deal(
        secrets.token_hex(16), subject, challenger.version, before.version, [row.caption for row in cards[0].captions], pairs,
        random.SystemRandom(),
    )  # fmt: skip
    drawn = [_draw(workspace, v, card, sheet) for v, card in zip((challenger, before), cards, strict=True)]
    sides = [(a, b) if left else (b, a) for a, b, left in zip(*drawn, sheet.challenger_left, strict=True)]
    folder = workspace.root / "ratings"
    folder.mkdir(exist_ok=True)
    _save(folder / f"{sheet.id}.json", sheet.model_dump_json(indent=1))
    return sheet, rating.page(sheet, sides)


def _couple(workspace: Workspace, subject: Subject, version: int | None, against: int | None) -> tuple[Seal, Seal]:
    known = [v.number for v in workspace.catalog.versions(subject) if v.number in judged(workspace, subject)]
    if len(known) < 2:
        raise CatalogError(
            f"{subject} has {len(known) or 'no'} version{'s' * (len(known) != 1)}, and two are compared; run `ferry retrain`"
        )
    present = champion_of(workspace, subject)
    champion = present.version if present else None
    others = [number for number in known if number != champion]
    newest = others[-1] if champion is None or others[-1] > champion else champion
    challenger = sealed(workspace, subject, version or newest)
    if against:
        return challenger, sealed(workspace, subject, against)
    if present and champion != challenger.version:
        return challenger, present
    was = [e.facts["version"] for e in promotions(workspace, subject) if e.facts["version"] != challenger.version]
    if not was:
        raise CatalogError(f"{subject} version {challenger.version} has replaced no other; name one to compare with by --against")
    return challenger, sealed(workspace, subject, was[-1])


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
    path = workspace.root / "ratings" / f"{sheet.id}.html"
    _save(path, page)
    return path


def _save(path: Path, text: str) -> None:
    with output.fresh(path) as file:
        file.write(text.encode())


def collect(workspace: Workspace, subject: str, files: list[Path]) -> list[Rated]:
    """Record the answers in files that raters sent back; answers that were recorded before change nothing.

    Raises:
        RatingError: a file holds no answers to a sheet of this workspace and subject, and nothing was recorded; also as `keep`.
        StoreError, BusyError: as `keep`.
    """
    workspace.line(Subject.parse(subject).line)
    found = []
    for path in files:
        with path.open("rb") as file:
            answers = rating.read(file.read(MAX_ANSWERS + 1))
        sheet = open_sheet(workspace, answers.sheet)
        if sheet.subject != subject:
            raise RatingError(
                f"{path} answers a sheet of {sheet.subject}; collect it with `ferry rate {sheet.subject} --answers`"
            )
        found.append((sheet, answers))
    return [keep(workspace, sheet, answers) for sheet, answers in found]


def open_sheet(workspace: Workspace, identity: str) -> Sheet:
    """Read an answer sheet of this workspace.

    Raises:
        RatingError: the workspace has no sheet of this name, or the file is damaged.
    """
    path = workspace.root / "ratings" / f"{identity}.json"
    try:
        return Sheet.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise RatingError(f"this workspace made no sheet {identity}; collect the answers where it was made") from None
    except ValidationError as error:
        raise RatingError(f"{path} is damaged; restore it from a backup, or ask the raters again") from error


def keep(workspace: Workspace, sheet: Sheet, answers: Answers) -> Rated:
    """Record a finished sheet in the ledger; the same answers again change nothing.

    Raises:
        RatingError: the answers do not fit the sheet, or this rater gave other answers before.
        StoreError: the database failed; nothing was recorded.
        BusyError: another process is recording something.
    """
    rated = rating.decode(sheet, answers)
    with workspace.locked("records"):
        for known in _rated(workspace, sheet.subject):
            if (known.sheet, known.rater.casefold()) == (rated.sheet, rated.rater.casefold()):
                if known.choices != rated.choices:
                    raise RatingError(f"{rated.rater} has answered this sheet already; the first answers count")
                return known
        wins, losses = rated.choices.count("challenger"), rated.choices.count("before")
        workspace.ledger.append(
            "rating", sheet.subject,
            f"{rated.rater}, blind, preferred version {sheet.challenger} over {sheet.before} in {wins} of {wins + losses} pairs, "
            f"{len(rated.choices) - wins - losses} alike",
            rated.model_dump(mode="json"),
        )  # fmt: skip
    return rated


def _rated(workspace: Workspace, subject: str) -> list[Rated]:
    return [Rated.model_validate(e.facts) for e in workspace.ledger.entries(subject) if e.kind == "rating"]


def verdicts(workspace: Workspace, subject: str) -> list[Verdict]:
    """Combine all finished sheets of a subject; return one result for each two versions that were compared."""
    return rating.judge(_rated(workspace, subject))


@contextmanager
def server(workspace: Workspace, sheet: Sheet, page: str, port: int = 0) -> Iterator[str]:
    """Show a sheet on the loopback interface and record the answers that come back, as long as the block lasts.

    Only requests that name this host and port are served, and only the page itself may send answers. So another page in the
    rater's browser can neither read the sheet nor answer it. The path is random and is written nowhere, so other users of the
    machine do not know it. The sheet's id would not be secret, because it is the name of a file.

    Yields:
        the address to open.
    """
    workspace.ledger.head()  # opens the ledger here, so that two requests do not open it at once
    path = f"/{secrets.token_urlsafe(16)}/"
    with ThreadingHTTPServer(("127.0.0.1", port), _handler(workspace, sheet, page, path)) as listening:
        listening.daemon_threads = True
        thread = threading.Thread(target=listening.serve_forever, name="rate", daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_port}{path}"
        finally:
            listening.shutdown()
            thread.join()


def wait() -> None:
    """Wait until somebody presses Ctrl-C."""
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        return


def _handler(workspace: Workspace, sheet: Sheet, page: str, path: str) -> type[BaseHTTPRequestHandler]:
    body = page.encode()

    class Handler(BaseHTTPRequestHandler):
        """Serves the page at one path, and takes answers at another."""

        timeout = REQUEST_SECONDS
        server_version, sys_version = "ferry", ""

        def do_GET(self) -> None:
            """Send the page."""
            if self._is_for_us(path):
                self._reply(HTTPStatus.OK, body, "text/html; charset=utf-8")

        def do_POST(self) -> None:
            """Check answers and record them."""
            length = self.headers.get("Content-Length", "")
            if not (length.isascii() and length.isdigit() and len(length) < 10) or int(length) > MAX_ANSWERS:
                self._say(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"answers of at most {MAX_ANSWERS} bytes are taken")
                return
            data = self.rfile.read(int(length))  # also if the request is refused: closing with unread bytes may lose the reply
            if not self._is_for_us(f"{path}answers"):
                return
            if self.headers.get("Origin") != f"http://{self.headers['Host']}":
                self._say(HTTPStatus.FORBIDDEN, "answers are taken from the page itself only; open it again")
                return
            try:
                keep(workspace, sheet, rating.read(data))
            except RatingError as error:
                self._say(HTTPStatus.BAD_REQUEST, str(error))
            except (RegistryError, BusyError) as error:
                self._say(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
            else:
                self._say(HTTPStatus.OK, "Your answers are kept. Thank you.")

        def _is_for_us(self, wanted: str) -> bool:
            port = cast("ThreadingHTTPServer", self.server).server_port
            if self.headers.get("Host") not in {f"127.0.0.1:{port}", f"localhost:{port}"}:
                self._say(HTTPStatus.MISDIRECTED_REQUEST, "this is not the host that was asked for")
                return False
            if self.path != wanted:
                self._say(HTTPStatus.NOT_FOUND, "there is nothing here; open the address that `ferry rate --serve` printed")
                return False
            return True

        def _say(self, status: HTTPStatus, text: str) -> None:
            self._reply(status, text.encode(), "text/plain; charset=utf-8")

        def _reply(self, status: HTTPStatus, data: bytes, kind: str) -> None:
            self.send_response(status)
            for name, value in {
                "Content-Type": kind, "Content-Length": str(len(data)), "Cache-Control": "no-store",
                "X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin",
                "Content-Security-Policy": f"{rating.POLICY}; frame-ancestors 'none'",
            }.items():  # fmt: skip
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Log nothing: the path in the address must stay known to the raters alone."""

    return Handler
