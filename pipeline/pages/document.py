"""One HTML file around a body: it needs no network, no script and no other file, and says so to the browser."""

from html import escape

ALONE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # a browser loads nothing, whatever is inside


def document(title: str, style: str, body: str, *, policy: str | None = ALONE, head: str = "") -> str:
    """The whole file. `body` is HTML, `title` is text; `policy` None lets the page show pictures beside it."""
    alone = f'<meta http-equiv="Content-Security-Policy" content="{policy}">' if policy else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{alone}{head}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )
