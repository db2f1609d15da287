"""The sections of the certificate's page on leaks and copies: what was found, and pairs side by side."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pipeline.ingestion.certificate.pictures import PAIRS_SHOWN
from pipeline.ingestion.certificate.verdict import number
from pipeline.shards.index import SPLITS

Facts = Mapping[str, Any]
KINDS = {
    "leaks": ("Images that leak", "leaking_images"),
    "contradictory_labels": ("Equal pixels, different labels", "contradictory_labels"),
    "suspicious_labels": ("Near copies, different labels", "suspicious_labels"),
    "exact_copies": ("Equal pixels inside a split", "exact_copies"),
    "near_copies": ("Near copies inside a split", "near_copies"),
}


def copy_sections(copies: Facts | None, pictures: Mapping[int, str]) -> str:
    if copies is None:
        return "<h2>Copies</h2><p>Not looked for: the ingestion examined headers alone.</p>"
    parts = [f"<h2>Leaks and copies</h2><p>{copies['compared_images']:,} images were compared with one another.</p>"]
    if copies["too_small_for_near"]:
        parts.append(f"<p>Of {copies['too_small_for_near']:,} small ones only equal pixels were looked for.</p>")
    parts.append(_leaks(copies["leaks"]))
    for kind, (title, counted) in KINDS.items():
        count = copies[counted]
        if kind == "contradictory_labels":
            count = f"{number(count['images'], 'image')} in {number(count['groups'], 'group')}"
        count = sum(count.values()) if isinstance(count, Mapping) else count
        parts.append(_pairs(title, copies["examples"][kind], count, pictures))
    removed = copies["removed"]
    parts.append(_pairs("Left out as copies", removed["examples"], removed["images"], pictures))
    return "".join(parts)


def _leaks(leaks: Sequence[Facts]) -> str:
    if not leaks:
        return "<p>No image was found in two splits, nor in a dataset that was named to be held against.</p>"
    rows = "".join(
        f"<tr><td>{escape(leak['from'])}</td><td>{escape(leak['to'])}</td><td class=number>{leak['exact']:,}</td>"
        f"<td class=number>{leak['near']:,}</td><td class=number>{leak['images_there']:,} of "
        f"{leak['of_images_there']:,}</td></tr>"
        for leak in leaks
    )
    head = "<tr><th>images of</th><th>are also in</th><th class=number>equal</th><th class=number>near</th>"
    return f"<table>{head}<th class=number>images known there</th></tr>{rows}</table>"


def _pairs(title: str, pairs: Sequence[Facts], count: int | str, pictures: Mapping[int, str]) -> str:
    if not pairs:
        return ""
    shown = "".join(_pair(pair, pictures) for pair in pairs[:PAIRS_SHOWN])
    more = len(pairs) - PAIRS_SHOWN
    rest = f'<p class="quiet">and {more:,} more pairs in certificate.json</p>' if more > 0 else ""
    count = count if isinstance(count, str) else f"{count:,}"
    return f'<h3>{title}: {count}</h3><div class="pairs">{shown}</div>{rest}'


def _pair(pair: Facts, pictures: Mapping[int, str]) -> str:
    images = "".join(_image(image, pictures) for image in pair["images"])
    apart = pair["grey_levels"]
    words = f"{apart:.1f} grey levels apart" if apart else "equal pixels"
    small = (
        " small pixels" if any("image/png" in pictures.get(image["_position"], "") for image in pair["images"]) else ""
    )
    return f'<div class="pair{small}"><div>{images}</div><p class="quiet">{words}</p></div>'


def _image(image: Facts, pictures: Mapping[int, str]) -> str:
    uri = pictures.get(image["_position"])
    drawn = f'<img src="{uri}" alt="" loading="lazy">' if uri else "not to be shown"
    split = image["split"]
    tag = f'<span class="tag {split if split in SPLITS else "other"}">{escape(split)}</span>'
    name = escape(image.get("source") or image["key"] or "").replace("/", "/<wbr>")
    label = f" <b>{escape(image['class'])}</b>" if "class" in image else ""
    return f'<figure><div class="frame">{drawn}</div><figcaption>{tag}{label}<br>{name}</figcaption></figure>'
