"""Looking at a page as a browser does: what it would load, what a person reads, and whether a phone has room for it."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

needs_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
ACTIVE = {"script", "link", "iframe", "object", "base", "form", "embed"}


class Page(HTMLParser):
    """Tags, links, styles, text and blocks of code of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.styles: list[str] = [""]
        self.text, self.code = "", [""]
        self._inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._inside.append(tag)
        if tag == "pre":
            self.code.append("")
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "action")]
        self.styles += [value or "" for name, value in attributes if name == "style"]

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] == "style":
            self.styles.append(data)
            return
        self.text += data
        if "pre" in self._inside:
            self.code[-1] += data

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:  # of tags that are never closed
            pass

    def require_alone(self) -> None:
        """No script, and nothing that a browser would ask anybody for."""
        assert not ACTIVE & self.tags
        assert all(link.startswith(("data:image/", "#")) for link in self.links), self.links
        loaded = [rule for style in self.styles for rule in re.findall(r"url\(([^)]*)|@import", style)]
        assert all(what.startswith("data:image/") for what in loaded)


def wider_than_a_phone(page: Path, folder: Path) -> str:
    """What is wider than 390 pixels, in words; "" where nothing is.

    A frame as wide as a phone, and a script that writes how wide the page in it is.
    """
    html = page.read_text().replace("<meta http-equiv", "<meta name", 1)
    measure = (
        "<script>addEventListener('load',()=>{const wide=[...document.querySelectorAll('main *')].filter(e=>"
        "e.getBoundingClientRect().right>innerWidth+1&&!e.closest('svg')&&!e.closest('.scroll')&&!e.closest('pre'))"
        ".map(e=>e.className||e.tagName);"
        "const spare=innerWidth-document.documentElement.scrollWidth;"
        "document.title='wide:'+(spare>=0?'':-spare+' pixels too wide')+':'+wide.slice(0,5)})</script>"
    )
    (folder / "page.html").write_text(html.replace("</body>", f"{measure}</body>"))
    frame = folder / "frame.html"
    frame.write_text(
        '<iframe src="page.html" width="390" height="3000" style="border:0"></iframe><script>addEventListener("load",'
        "()=>{document.body.append(frames[0].document.title)})</script>"
    )
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    shown = subprocess.run(
        [*command, "--virtual-time-budget=4000", "--dump-dom", frame.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    measured = shown.stdout.rpartition("wide:")[2].partition("<")[0].strip()
    return "" if measured == ":" else measured or shown.stderr[-500:]
