"""Hook of mkdocs: whatever pages link to outside docs/ becomes a part of the site, so that no link of it is dead.

Below `checkout/` a Markdown file and a folder's README are pages, other text is shown as it is, a folder of runs is their
report, and a picture is copied. The links of these pages are followed in turn.
"""

from __future__ import annotations

import contextlib
import io
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from offrl.results.report import report

ROOT = Path(__file__).resolve().parent
DOCS = ROOT / "docs"
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[\w-]+)?\))")
TEXT = {".py", ".sh", ".yaml", ".toml", ".csv", ".json", ".txt", ".cff", ".ipynb", ""}
HEAD = "---\ntitle: {title}\nsearch:\n  exclude: true\n---\n"


def on_files(files: Files, config: Any) -> Files:
    """Add a file for everything that a page leads to, however many links away."""
    unread = list(DOCS.glob("**/*.md"))
    while unread:
        for target in _targets(unread.pop()):
            uri = _uri(target)
            if uri and not target.is_relative_to(DOCS) and uri not in files.src_uris:
                files.append(_file(target, uri, config))
                unread.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point the links of a page of docs/ into the site."""
    uri = page.file.src_uri
    return markdown if uri.startswith("checkout/") else _linked(markdown, DOCS, uri)


def on_post_build(config: Any) -> None:
    """Write the reports of the folders of runs that are shown."""
    site = Path(config.site_dir)
    for index in (site / "checkout").glob("**/index.html"):
        folder = ROOT / index.parent.relative_to(site / "checkout")
        if _holds_runs(folder):
            with contextlib.redirect_stdout(io.StringIO()):
                report([folder], index.parent / "report")


def _page(target: Path) -> Path | None:
    """The Markdown that shows a file or folder; None where it has none."""
    page = target / "README.md" if target.is_dir() else target
    return page if page.suffix == ".md" and page.is_file() else None


def _targets(target: Path) -> list[Path]:
    if not (page := _page(target)):
        return []
    return [(page.parent / path).resolve() for _, path, _ in LINK.findall(page.read_text())]


def _uri(target: Path) -> str | None:
    """Where the site has a file or folder of the checkout; None where there is no such thing."""
    if not (target.exists() and target.is_relative_to(ROOT)):
        return None
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    place = "checkout" / target.relative_to(ROOT)
    if target.is_dir() or target.name == "README.md":
        return ((place if target.is_dir() else place.parent) / "index.md").as_posix()
    shown = target.suffix != ".md" and target.suffix in TEXT
    return f"{place.as_posix()}.md" if shown else place.as_posix()


def _file(target: Path, uri: str, config: Any) -> File:
    if not uri.endswith(".md"):
        return File.generated(config, uri, abs_src_path=str(target))
    title = target.relative_to(ROOT).as_posix()
    if page := _page(target):
        return File.generated(config, uri, content=_linked(page.read_text(), page.parent, uri))
    if not target.is_dir():
        body = f"# {title}\n\n`````{target.suffix[1:]}\n{target.read_text()}\n`````\n"
    elif _holds_runs(target):
        frame = '<iframe src="report/report.html" class="report"></iframe>'
        body = f'# {title}\n\n<a href="report/report.html">The page alone</a>\n\n{frame}\n'
    else:
        body = f"# {title}\n\n" + "".join(f"- {entry.name}\n" for entry in sorted(target.iterdir()))
    return File.generated(config, uri, content=HEAD.format(title=title) + body)


def _holds_runs(folder: Path) -> bool:
    return folder.is_dir() and not (folder / "README.md").exists() and any(folder.glob("**/episodes.jsonl"))


def _linked(text: str, folder: Path, uri: str) -> str:
    """The text of a Markdown file in `folder` with its links as from the page `uri`."""

    def replaced(link: re.Match[str]) -> str:
        target = _uri((folder / link[2]).resolve())
        return link[0] if target is None else link[1] + posixpath.relpath(target, posixpath.dirname(uri)) + link[3]

    return LINK.sub(replaced, text)
