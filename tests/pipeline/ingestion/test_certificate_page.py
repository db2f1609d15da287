"""The page of a certificate: alone, honest about hostile names, and no wider than a phone."""

from pathlib import Path

import pytest

from tests.pipeline.ingestion.test_certificate import made, write
from tests.pipeline.lineage.test_likeness import scene
from tests.pipeline.pages import Page, needs_browser, wider_than_a_phone


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
    links = Page(page)
    links.require_alone()
    assert links.links and any("url(data:image/" in style for style in links.styles)
    assert "<script>alert(1)" in links.text and "a\"b'c&d" in links.text and "日本 語" in links.text
    assert "url(http:" in links.text  # a folder's name, and nothing else


@needs_browser
def test_nothing_on_the_page_is_wider_than_a_phone(hostile_page, tmp_path):
    assert wider_than_a_phone(hostile_page, tmp_path) == ""
