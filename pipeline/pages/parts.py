"""Pieces of a page: tables that scroll on a phone, tiles, folded parts, code. Whatever is no `Html` is escaped."""

from collections.abc import Collection, Iterable, Sequence
from html import escape


class Html(str):
    """Text that is HTML already."""


def html_of(cell: object) -> str:
    return cell if isinstance(cell, Html) else escape(str(cell))


def table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: Collection[int] = ()) -> Html:
    """A table that scrolls by itself where it is wider than the page; `numbers` are columns set to the right."""
    kinds = [' class="number"' if column in numbers else "" for column in range(len(head))]
    top = "".join(f'<th scope="col"{kind}>{html_of(name)}</th>' for name, kind in zip(head, kinds, strict=True))
    lines = "".join(
        "<tr>" + "".join(f"<td{kind}>{html_of(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>\n"
        for row in rows
    )
    return Html(f'<div class="scroll" tabindex="0"><table><tr>{top}</tr>\n{lines}</table></div>')


def facts_table(facts: Iterable[tuple[str, object]]) -> Html:
    """A row per fact: its name, and what is known."""
    lines = "".join(f'<tr><th scope="row">{html_of(name)}</th><td>{html_of(said)}</td></tr>\n' for name, said in facts)
    return Html(f'<div class="facts"><table>{lines}</table></div>')


def tiles(facts: Iterable[tuple[object, str]]) -> Html:
    """Numbers that are read first, each with what it is of."""
    drawn = "".join(
        f'<div class="tile"><b>{html_of(said)}</b><span>{html_of(word)}</span></div>' for said, word in facts
    )
    return Html(f'<div class="tiles">{drawn}</div>')


def bullets(lines: Iterable[object]) -> Html:
    return Html(f"<ul>{''.join(f'<li>{html_of(line)}</li>' for line in lines)}</ul>")


def paragraph(words: object, kind: str = "") -> Html:
    return Html(f"<p{f' class={kind}' if kind else ''}>{html_of(words)}</p>")


def folded(summary: object, body: object) -> Html:
    """Shown when it is asked for."""
    return Html(f"<details><summary>{html_of(summary)}</summary>{html_of(body)}</details>")


def code(text: str) -> Html:
    """A block to copy; its lines are never broken."""
    return Html(f'<pre tabindex="0"><code>{escape(text)}</code></pre>')


def word(text: str) -> Html:
    """A path, a name or a command inside of a line."""
    return Html(f"<code>{escape(text)}</code>")


def joined(*parts: object) -> Html:
    return Html("".join(html_of(part) for part in parts))
