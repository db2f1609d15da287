"""`index.html`: every picture of an inspection with a sentence, and what could not be drawn. One file, no script."""

import html
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.pages.document import document
from pipeline.pages.style import style

PAGE = "index.html"
MARK = '<meta name="generator" content="vit inspect">'
_STYLE = style("img{max-width:100%;height:auto;border:1px solid var(--line);background:#fff}")
WORDS = {  # title and sentence of each picture
    "filters.png": (
        "Patch-embedding filters",
        "What the first layer looks for in a patch. Trained well, smooth edges, blobs and colours come first; noise "
        "says that it has learned little.",
    ),
    "position-similarity.png": (
        "Position embedding",
        "How alike the positions of patches are to the model. Near patches, and those of one row or column, should be "
        "more alike than far ones.",
    ),
    "attention-distance.png": (
        "Attention distance",
        "How far each head looks. Heads of the first blocks that stay near work as convolutions do; heads that look "
        "far bring the whole image together.",
    ),
    "attention-heads.png": (
        "Attention of the last block",
        "Which patches each head of the last block reads. The same few bright patches in every image are the model's "
        "memory rather than the image.",
    ),
    "attention-rollout.png": (
        "Attention rollout",
        "Which patches the output depends on through all blocks, as far as attention tells.",
    ),
    "features.png": (
        "Patch features",
        "Which patches the model holds for alike. Parts of one thing should share a colour, also from image to image.",
    ),
    "reconstructions.png": (
        "Masked reconstructions",
        "What the model fills in where patches are hidden as in training. If it learned patches without their "
        "brightness and contrast (objective.normalise_target), a hidden patch has its own back.",
    ),
    "filled-in.png": (
        "Filled in",
        "What the model fills in where the mask covers an image; it sees no patch that the mask touches. Brightness "
        "and contrast that it did not learn come from the patches around.",
    ),
}


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
    body = (
        f"<h1>{_safe(heading)}</h1>\n"
        + "".join(f"<p>{_safe(fact)}</p>\n" for fact in facts)
        + figures
        + (f"\n<h2>Not drawn</h2>\n<ul>\n{rest}</ul>" if missing else "")
    )
    return document(heading, _STYLE, body, policy=None, head=MARK)


def _safe(words: str) -> str:
    return html.escape(words, quote=True)
