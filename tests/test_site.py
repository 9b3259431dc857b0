"""The site that `make docs` builds: every link and anchor of it leads somewhere, and it asks nobody else for anything."""

from __future__ import annotations

import html
import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs/img"
LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("link", "href")}
# What the theme's scripts fetch only for a setting that the site does not have: diagrams in Mermaid, a repository's stars.
UNUSED = {'<pre class="mermaid"', 'data-md-component="source"'}


class Page(HTMLParser):
    """Links, names of anchors, and addresses that a browser loads by itself."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.loaded: list[str] = []
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value or "")
            if (tag, name) in LOADED:
                self.loaded.append(value or "")
            if name in ("href", "src"):
                self.links.append(value or "")


def edges(text: str) -> set[str]:
    """`a->b` of every arrow of a drawing's source."""
    return {f"{a}->{b}" for a, b in re.findall(r"^ *(\w+) -> (\w+)", text, re.MULTILINE)}


@pytest.mark.parametrize("source", sorted(IMAGES.glob("*.dot")), ids=lambda path: path.stem)
def test_a_drawing_is_that_of_its_source(source: Path) -> None:
    drawn = html.unescape(source.with_suffix(".svg").read_text())
    titles = set(re.findall(r"<title>(\w+->\w+)</title>", drawn))
    assert titles == edges(source.read_text())
    lines = {line for label in re.findall(r'label=" ?(.*?)"', source.read_text()) for line in label.split("\\n")}
    assert lines - {text.strip() for text in re.findall(r"<text[^>]*>(.*?)</text>", drawn)} == set()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """Every page of the site by its path, built as by `make docs`."""
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return {path: Page(path) for path in folder.rglob("*.html") if path.name != "404.html"}  # whose links are absolute


@pytest.mark.slow
def test_every_link_leads_somewhere(site: dict[Path, Page]) -> None:
    dead = []
    for path, page in site.items():
        for link in page.links:
            address = urlsplit(link)
            if address.scheme or link.startswith("//"):
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(address.fragment)
            known = target.exists() and (target not in site or not anchor or anchor in site[target].anchors)
            dead += [] if known else [f"{path}: {link}"]
    assert len(site) > 100
    assert dead == []


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site: dict[Path, Page]) -> None:
    for path, page in site.items():
        assert [address for address in page.loaded if urlsplit(address).netloc] == [], path
        assert not any(part in page.text for part in UNUSED), path
