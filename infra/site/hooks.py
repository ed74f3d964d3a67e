"""What MkDocs calls while it builds the site: add the generated pages, list the decisions, and check that no page loads from elsewhere."""

from __future__ import annotations

import logging
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # MkDocs loads this file by its path

from infra.site.pages import generated  # noqa: E402

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

log = logging.getLogger("mkdocs.hooks.site")  # a warning fails a strict build

LOADED = {
    "script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src", "embed": "src", "object": "data",
    "image": "href", "use": "href",
}  # fmt: skip
"""Elements, and the attribute whose address a browser fetches by itself."""
FETCHED_LINKS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "manifest", "modulepreload"}
OTHER_HOST = re.compile(r"\s*(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
IN_STYLES = re.compile(r"""(?:url\(|@import)\s*["']?\s*((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the files that a name with * stands for into the navigation, such as decisions/*.md."""
    config.nav = expanded(config.nav, Path(config.docs_dir))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for path, write in generated().items():
        files.append(File.generated(config, path, content=write()))
    return files


def on_post_build(config: MkDocsConfig) -> None:
    """Warn about everything that a page would load from another host."""
    for problem in foreign(Path(config.site_dir)):
        log.warning("%s", problem)


def expanded(nav: Any, docs: Path) -> Any:
    """Replace each name with * in a navigation by the files below `docs` that it stands for, without index.md."""
    if isinstance(nav, list):
        return [made for item in nav for made in _items(item, docs)]
    if isinstance(nav, dict):
        return {title: expanded(below, docs) for title, below in nav.items()}
    return nav


def _items(item: Any, docs: Path) -> list[Any]:
    if isinstance(item, str) and "*" in item:
        return [path.relative_to(docs).as_posix() for path in sorted(docs.glob(item)) if path.name != "index.md"]
    return [expanded(item, docs)]


def foreign(site: Path) -> list[str]:
    """List what the pages and style sheets of a built site load from other hosts; links that a reader clicks are not loaded."""
    found: list[str] = []
    for path in sorted(site.rglob("*")):
        if path.suffix in (".html", ".css", ".svg"):
            text = path.read_text(encoding="utf-8")
            page = _Page()
            if path.suffix != ".css":
                page.feed(text)
            addresses = [*page.found, *IN_STYLES.findall(text)]
            found += [f"{path.relative_to(site)} loads {address} from another host; copy it to docs/" for address in addresses]
    return found


class _Page(HTMLParser):
    """Collects the addresses of other hosts that a browser fetches with a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Look at one element."""
        given = {name: value or "" for name, value in attrs}
        address = given.get(LOADED.get(tag, ""), "")
        if tag == "link" and FETCHED_LINKS & set(given.get("rel", "").lower().split()):
            address = given.get("href", "")
        loaded = [address, *(part.split()[0] for part in given.get("srcset", "").split(",") if part.strip())]
        self.found += [part for part in loaded if OTHER_HOST.match(part)]
        if "mermaid" in given.get("class", "").split():
            self.found.append("a script for its diagram")
