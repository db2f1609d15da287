"""`index.html`: every picture of an inspection with a sentence, and what could not be drawn. One file, no script."""

import html
from collections.abc import Sequence
from typing import NamedTuple

PAGE = "index.html"
MARK = '<meta name="generator" content="vit inspect">'
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin-top: 2.5rem; }
img { max-width: 100%; height: auto; border: 1px solid #ddd; }
p { max-width: 46rem; overflow-wrap: anywhere; }
"""


class Shown(NamedTuple):
    """A picture that was drawn."""

    file: str
    title: str
    sentence: str


class NotShown(NamedTuple):
    """A picture that was not, and why."""

    title: str
    reason: str


def page(heading: str, facts: Sequence[str], shown: Sequence[Shown], missing: Sequence[NotShown]) -> str:
    """The whole file."""
    figures = "\n".join(
        f"<h2>{_safe(one.title)}</h2>\n<p>{_safe(one.sentence)}</p>\n"
        f'<a href="{_safe(one.file)}"><img src="{_safe(one.file)}" alt="{_safe(one.title)}"></a>'
        for one in shown
    )
    rest = "".join(f"<li>{_safe(one.title)}: {_safe(one.reason)}</li>\n" for one in missing)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{MARK}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_safe(heading)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{_safe(heading)}</h1>\n"
        + "".join(f"<p>{_safe(fact)}</p>\n" for fact in facts)
        + figures
        + (f"\n<h2>Not drawn</h2>\n<ul>\n{rest}</ul>" if missing else "")
        + "\n</body>\n</html>\n"
    )


def _safe(words: str) -> str:
    return html.escape(words, quote=True)
