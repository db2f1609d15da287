"""`certificate.html`: one file that a person reads from top to bottom, without network, scripts or other files.

Every name in it comes from somebody's files, so every one is escaped; pictures are data URIs.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pipeline.ingestion.certificate.charts import class_skyline, colour_statistics, histogram, shares, split_bar
from pipeline.ingestion.certificate.copy_sections import copy_sections
from pipeline.ingestion.certificate.pictures import MOST_SHEETS, Sheet
from pipeline.ingestion.certificate.style import STYLE
from pipeline.pages.document import document
from pipeline.words import bytes_in_words

PIXELATED = 40  # pixels a side of a picture, up to which it is shown enlarged, pixel by pixel
Facts = Mapping[str, Any]


def certificate_page(facts: Facts, sheets: Sequence[Sheet], pictures: Mapping[int, str]) -> str:
    title = f"What is in {_name(facts)}"
    body = "\n".join(
        [
            f'<p class="kicker">Certificate of a dataset</p><h1>{escape(title)}</h1>',
            _verdict(facts["verdict"]),
            _tiles(facts),
            _splits(facts["splits"]),
            copy_sections(facts["copies"], pictures),
            _classes(facts, sheets),
            _rejected(facts["rejected"]),
            _images(facts),
            _not_examined(facts["not_examined"]),
            _provenance(facts),
            _how_to_read(facts),
        ]
    )
    return document(title, STYLE, body)


def _name(facts: Facts) -> str:
    source = facts["provenance"]["source"]
    return source.rstrip("/").rpartition("/")[2] or source


def _verdict(verdict: Facts) -> str:
    kind = "sound" if verdict["sound"] else "look"
    count = len(verdict["findings"])
    sound = "Sound, as far as it was examined" if "as far as" in verdict["words"] else "Sound"
    words = sound if verdict["sound"] else f"{count} finding{'s' * (count > 1)} to look at before training"
    lines = "".join(f"<li>{escape(line)}</li>" for line in verdict["findings"])
    told = f"<ul>{lines}</ul>" if lines else "<p>Nothing was found that speaks against training on it.</p>"
    notes = "".join(f"<li>{escape(note)}</li>" for note in verdict["notes"])
    notes = f'<p class="quiet">Good to know</p><ul class="quiet">{notes}</ul>' if notes else ""
    return f'<section class="verdict {kind}"><b>{words}</b>{told}</section>{notes}'


def _tiles(facts: Facts) -> str:
    copies = facts["copies"]
    tiles = [("images", sum(split["images"] for split in facts["splits"].values()))]
    if facts["classes"] is not None:
        tiles.append(("classes", len(facts["classes"])))
    if copies is not None:
        further = sum(sum(copies[kind].values()) for kind in ("exact_copies", "near_copies"))
        tiles += [("images that leak", copies["leaking_images"]), ("copies inside splits", further)]
        if copies["removed"]["images"]:
            tiles.append(("copies left out", copies["removed"]["images"]))
    rejected = facts["rejected"].values()
    tiles.append(("images not taken", sum(said["count"] for said in rejected if said["lost_image"])))
    drawn = "".join(f'<div class="tile"><b>{count:,}</b><span>{word}</span></div>' for word, count in tiles)
    return f'<div class="tiles">{drawn}</div>'


def _splits(splits: Facts) -> str:
    most = max(split["images"] for split in splits.values())
    rows = "".join(
        f"<tr><td>{name}</td><td class=number>{said['images']:,}</td><td class=number>{said['unlabelled']:,}</td>"
        f"<td class=number>{said['shards']:,}</td><td class=number>{_unbroken(said['bytes'])}</td>"
        f"<td class=share>{split_bar({name: said['images']}, most)}</td></tr>"
        for name, said in splits.items()
    )
    head = "".join(f"<th{kind}>{word}</th>" for word, kind in (
        ("split", ""), ("images", " class=number"), ("unlabelled", " class=number"), ("shards", " class=number"),
        ("size", " class=number"), ("", "")))  # fmt: skip
    return f"<h2>Splits</h2><table><tr>{head}</tr>{rows}</table>"


def _classes(facts: Facts, sheets: Sequence[Sheet]) -> str:
    splits = list(facts["splits"])
    if facts["classes"] is None and not sheets:
        return ""
    if facts["classes"] is None:
        cards = "".join(
            _card(sheet.name, {sheet.name: facts["splits"][sheet.name]["images"]}, sheet) for sheet in sheets
        )
        return (
            f'<h2>What it looks like</h2><p class="quiet">No image has a class.</p><div class="classes">{cards}</div>'
        )
    by_name = {sheet.name: sheet for sheet in sheets}
    most = max((sum(one[split] for split in splits) for one in facts["classes"]), default=1)
    shown = facts["classes"][:MOST_SHEETS]
    cards = "".join(
        _card(one["name"], {split: one[split] for split in splits}, by_name.get(one["name"]), most) for one in shown
    )
    legend = "".join(f'<span><i class="{split}"></i>{split}</span>' for split in splits)
    more = len(facts["classes"]) - len(shown)
    rest = f'<p class="quiet">and {more:,} more classes, in certificate.json</p>' if more else ""
    skyline = class_skyline(facts["classes"], splits) if len(facts["classes"]) > 3 else ""
    return (
        f'<h2>Classes</h2><p class="legend">{legend}</p>{skyline}<p class="quiet">Each class with its number of images'
        f'{" and the first of them, cut to squares" if sheets else ""}.</p><div class="classes">{cards}</div>{rest}'
    )


def _card(name: str, counts: Mapping[str, int], sheet: Sheet | None, most: int = 0) -> str:
    numbers = " · ".join(f"{count:,}" for count in counts.values())
    words = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    bar = split_bar(counts, most) if most else ""
    cells, pixels = "", ""
    if sheet is not None:
        pixels = " pixels" if sheet.side <= PIXELATED else ""
        cells = "".join(
            f'<i style="background-position:{100 * number / max(1, sheet.cells - 1):.3f}% 0"></i>'
            for number in range(sheet.cells)
        )
        style = f".s{sheet.number} i{{background-image:url({sheet.uri});background-size:{100 * sheet.cells}% 100%}}"
        cells = (
            f'<style>{style}</style><div class="sheet s{sheet.number}" role="img" aria-label="examples">{cells}</div>'
        )
    return (
        f'<article class="class{pixels}"><header><b>{escape(name)}</b><span title="{words}">{numbers}</span></header>'
        f"{bar}{cells}</article>"
    )


def _rejected(rejected: Facts) -> str:
    if not rejected:
        return "<h2>Not taken</h2><p>Every file of the source is in the dataset.</p>"
    parts = []
    for reason, said in rejected.items():
        files = "".join(
            f"<li><code>{escape(one['path'])}</code> <small>{escape(one['detail'])}</small></li>"
            for one in said["examples"]
        )
        more = said["count"] - len(said["examples"])
        rest = f"<li><small>and {more:,} more, in rejected.jsonl</small></li>" if more else ""
        kind = "" if said["lost_image"] else ' <span class="quiet">not meant to be taken, or left out on purpose</span>'
        parts.append(
            f"<details><summary><b>{said['count']:,}</b> {escape(reason.replace('_', ' '))}{kind}</summary>"
            f"<ul>{files}{rest}</ul></details>"
        )
    return f"<h2>Not taken</h2>{''.join(parts)}"


def _images(facts: Facts) -> str:
    images, statistics = facts["images"], facts["statistics"] or {}
    charts = [histogram(title, images[key], unit, images["sides"].get(key)) for title, key, unit in (
        ("Width", "width", "px"), ("Height", "height", "px"), ("Bytes of a file", "bytes", "bytes"))]  # fmt: skip
    total = images["counted"]
    tables = [
        shares("Formats of the files", images["formats"], total),
        shares("Modes of the files", images["modes"], total),
        shares("What was changed", images["changes"], total)
        or "<div class=shares><h3>What was changed</h3><p>Nothing: every image has its own bytes.</p></div>",
        shares("Colour profiles in the files", images["profiles"], total),
        colour_statistics(statistics.get("mean"), statistics.get("std")),
    ]
    return f'<h2>Images</h2><div class="charts">{"".join(charts)}</div><div class="columns">{"".join(tables)}</div>'


def _not_examined(notes: Sequence[str]) -> str:
    return f"<h2>Not examined</h2><ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>"


def _provenance(facts: Facts) -> str:
    said = facts["provenance"]
    rows = [("fingerprint", facts["fingerprint"]), ("source", said["source"])]
    rows += [(name, version) for name, version in said["versions"].items()]
    rows += [
        ("held against", f"{other['dataset']} (fingerprint {other['fingerprint'][:12]})")
        for other in said["leakage_against"]
    ]
    config = [(key, _written(value)) for key, value in said["config"].items() if value not in (None, [], ())]
    lines, settings = (
        "".join(f"<tr><th>{escape(key)}</th><td><code>{escape(value)}</code></td></tr>" for key, value in table)
        for table in (rows, config)
    )
    return (
        f"<h2>Where it comes from</h2><table>{lines}</table>"
        f"<details><summary>Settings of the ingestion</summary><table>{settings}</table></details>"
    )


def _unbroken(num_bytes: int) -> str:
    """Number and unit stay on one line."""
    return bytes_in_words(num_bytes).replace(" ", "&nbsp;")


def _written(value: Any) -> str:
    """As --set takes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _how_to_read(facts: Facts) -> str:
    copies = facts["copies"]
    method = ""
    if copies is not None:
        method = (
            f"<p><b>Copies.</b> Exact: {escape(copies['method']['exact'])}. Near: {escape(copies['method']['near'])}. "
            "0 grey levels are equal pictures; above 12 two pictures are rarely the same.</p>"
        )
    return (
        "<h2>How to read this</h2><p><b>Leaks.</b> An image leaks if it, or a near copy of it, lies where models are "
        "judged: of train in validation, test or a named evaluation dataset; of validation in test or such a dataset. "
        "A score on images that were trained on says little of new ones.</p>"
        f"{method}<p><b>Fingerprint.</b> A hash of all images, labels and annotations of each split, whatever their "
        "order: two datasets with the same fingerprint hold the same. <code>vit check DATASET --full</code> "
        "computes it again, and finds this page if it was edited.</p><p><b>Findings</b> are what to decide on before "
        "training; "
        "<code>duplicates=remove</code> leaves leaking images and equal copies out. The same facts, with more "
        "examples, are in <code>certificate.json</code>; every file that was not taken is in "
        "<code>rejected.jsonl</code>.</p>"
    )
