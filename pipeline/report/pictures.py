"""Pictures of a report as data URIs, made small again: no page is larger than a few megabytes. Torch-free."""

import base64
import io
import warnings
from html import escape
from pathlib import Path

from PIL import Image

from pipeline.pages.parts import Html, paragraph
from pipeline.redaction import first_line

MOST_BYTES = 3_500_000  # of all pictures of a page together, as the page has them
MOST_SIDE = 1400  # pixels
LOSSLESS_BYTES = 120_000  # a PNG up to this size stays one: lines and letters stay sharp
SMALL_SIDE = 420  # pixels, up to which a picture is shown enlarged, pixel by pixel


class Album:
    """Turns files into figures as long as there is room."""

    def __init__(self, most_bytes: int = MOST_BYTES):
        self.left = most_bytes

    def figure(self, path: Path, title: str, sentence: str = "") -> Html:
        """A figure; where the file cannot be shown, a line that says why; nothing where there is no file."""
        if not path.is_file():
            return Html()
        try:
            content, kind, (width, height) = _small(path)
        except (OSError, ValueError, Image.DecompressionBombError, Warning) as error:
            return paragraph(f"{title}: not shown, {path.name} cannot be read: {first_line(error, 120)}", "quiet")
        coded = base64.b64encode(content).decode()
        if len(coded) > self.left:
            return paragraph(f"{title}: not shown, this page has enough pictures; it is {path}", "quiet")
        self.left -= len(coded)
        small = " pixels" if max(width, height) <= SMALL_SIDE else ""
        size = f'width="{width}" height="{height}"'
        return Html(
            f'<figure class="picture{small}"><img src="data:image/{kind};base64,{coded}" {size} alt="{escape(title)}">'
            f"<figcaption><b>{escape(title)}</b> {escape(sentence)}</figcaption></figure>\n"
        )


def _small(path: Path) -> tuple[bytes, str, tuple[int, int]]:
    """The bytes of a picture that is no larger than it need be, their kind, and width and height in pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as opened:
            image = opened.convert("RGBA" if "A" in opened.getbands() else "RGB")
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image.thumbnail((MOST_SIDE, MOST_SIDE), Image.Resampling.LANCZOS)
    if path.stat().st_size <= 4 * LOSSLESS_BYTES:
        lossless = _encoded(image, "PNG", optimize=True)
        if len(lossless) <= LOSSLESS_BYTES:
            return lossless, "png", image.size
    return _encoded(image, "WEBP", quality=80), "webp", image.size


def _encoded(image: Image.Image, kind: str, **how) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **how)
    return content.getvalue()
