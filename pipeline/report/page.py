"""A report as a page: a verdict first, then sections by name, each of which may fail alone."""

import logging
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from pipeline.pages.document import document
from pipeline.pages.parts import Html, bullets, html_of, joined, paragraph
from pipeline.redaction import first_line, without_secrets_in_page
from pipeline.report.style import STYLE

log = logging.getLogger(__name__)


class Section(NamedTuple):
    """A part of a page; `draw` is called once."""

    title: str
    draw: Callable[[], Html]


class Verdict(NamedTuple):
    """What is read first: whether all is well, how it ended in a few words, and lines that say more."""

    good: bool
    words: str
    lines: Sequence[object] = ()


def report_page(kicker: str, title: str, verdict: Verdict, tiles: Html, sections: Sequence[Section]) -> str:
    """The whole file, without secrets."""
    names = [f"s{number}" for number in range(len(sections))]
    links = "".join(
        f'<a href="#{name}">{escape(section.title)}</a>' for name, section in zip(names, sections, strict=True)
    )
    kind = "sound" if verdict.good else "look"
    body = joined(
        Html(f'<p class="kicker">{escape(kicker)}</p><h1>{escape(title)}</h1>'),
        Html(f'<section class="verdict {kind}"><b>{html_of(verdict.words)}</b>'),
        bullets(verdict.lines) if verdict.lines else "", Html("</section>"),
        tiles,
        Html(f'<nav aria-label="Sections">{links}</nav>'),
        *(
            Html(f'<section id="{name}"><h2>{escape(section.title)}</h2>{drawn(section)}</section>\n')
            for name, section in zip(names, sections, strict=True)
        ),
    )  # fmt: skip
    return without_secrets_in_page(document(title, STYLE, body))


def drawn(section: Section) -> Html:
    """What a section says; where what it reads is damaged, that instead: the rest of the page is there."""
    try:
        return section.draw()
    except Exception as error:  # whatever a file of any version, or a half of one, makes of it
        log.debug("%s", section.title, exc_info=True)
        return paragraph(f"could not be shown: {first_line(error, 300)}", "quiet")
