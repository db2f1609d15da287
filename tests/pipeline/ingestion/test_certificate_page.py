"""The page of a certificate: alone, honest about hostile names, and no wider than a phone."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.pipeline.ingestion.test_certificate import made, write
from tests.pipeline.lineage.test_likeness import scene


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text, self.styles, self._style = "", [""], False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._style = tag == "style"
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "action")]
        self.styles += [value or "" for name, value in attributes if name == "style"]

    def handle_data(self, data: str) -> None:
        if self._style:
            self.styles.append(data)
        else:
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._style = False


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    names = ("<script>alert(1)</script>", "a\"b'c&d", "x" * 120, "日本 語", "url(http://example.org)")
    for number, name in enumerate(names):
        write(folder / f"images/train/{name.replace('/', '')}/{number}.png", scene(number))
        write(folder / f"images/test/{name.replace('/', '')}/<b>{'y' * 90}{number}.png", scene(number))
    (folder / "images/<img src=http:x>.txt").write_text("no image")
    made(folder / "images", folder / "dataset")
    return folder / "dataset/certificate.html"


def test_the_page_stands_alone_and_shows_names_as_they_are(hostile_page):
    page = hostile_page.read_text()
    links = _Links()
    links.feed(page)
    assert not {"script", "link", "iframe", "object", "base", "form"} & links.tags
    assert links.links and all(link.startswith("data:image/") for link in links.links)
    loaded = [rule for style in links.styles for rule in re.findall(r"url\(([^)]*)|@import", style)]
    assert loaded and all(what.startswith("data:image/") for what in loaded)
    assert "<script>alert(1)" in links.text and "a\"b'c&d" in links.text and "日本 語" in links.text
    assert "url(http:" in links.text  # a folder's name, and nothing else


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_nothing_on_the_page_is_wider_than_a_phone(hostile_page, tmp_path):
    """A frame as wide as a phone, and a script that writes how wide the page in it is."""
    frame = tmp_path / "frame.html"
    page = hostile_page.read_text().replace("<meta http-equiv", "<meta name", 1)
    measure = (
        "<script>addEventListener('load',()=>{const wide=[...document.querySelectorAll('main *')].filter(e=>"
        "e.getBoundingClientRect().right>innerWidth+1&&!e.closest('svg')).map(e=>e.className||e.tagName);"
        "document.title='wide:'+(document.documentElement.scrollWidth-innerWidth<=0)+':'+wide.slice(0,5)})</script>"
    )
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{measure}</body>"))
    frame.write_text(
        '<iframe src="page.html" width="390" height="3000" style="border:0"></iframe><script>addEventListener("load",'
        "()=>{document.body.append(frames[0].document.title)})</script>"
    )
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    shown = subprocess.run(
        [*command, "--virtual-time-budget=4000", "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    measured = shown.stdout.rpartition("wide:")[2].partition("<")[0].strip()
    assert measured == "true:", measured or shown.stderr[-500:]
