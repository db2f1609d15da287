"""What a report says of a dataset: the verdict of its certificate, and what is in it. Torch-free."""

import contextlib
from pathlib import Path
from typing import Any

from pipeline.errors import FaultError, InputError
from pipeline.pages.parts import Html, bullets, facts_table, joined, paragraph, table, word
from pipeline.redaction import first_line
from pipeline.run_directory import read_json
from pipeline.shards.index import DatasetIndex, read_index
from pipeline.storage.location import is_url
from pipeline.words import bytes_in_words

CLASSES_NAMED = 12


def dataset_summary(path: str, fingerprint: str | None = None) -> Html:
    """Verdict, splits and classes of a dataset, and its fingerprint; says so where it is not the one it was."""
    title = Html(f"<h3>{word(path)}</h3>")
    try:
        index = read_index(path if is_url(path) else Path(path))
    except (InputError, FaultError, OSError) as error:
        known = f" Its fingerprint was {fingerprint}." if fingerprint else ""
        return joined(title, paragraph(f"not here any more: {first_line(error, 300)}.{known}", "quiet"))
    if fingerprint not in (None, index.fingerprint):
        words = f"another dataset lies there now, of fingerprint {index.fingerprint}; the one used had {fingerprint}"
        return joined(title, paragraph(words, "quiet"))
    taken = len(index.tombstones)
    rows: list[tuple[str, object]] = [("fingerprint", word(index.fingerprint)), ("classes", _classes(index))]
    rows.append(("taken down since", f"{taken:,} samples" if taken else "nothing"))
    certificate = _certificate(index)
    return joined(title, _verdict(certificate, index), _splits(index), facts_table(rows))


def _certificate(index: DatasetIndex) -> dict[str, Any] | None:
    if not isinstance(index.directory, Path):
        return None
    with contextlib.suppress(ValueError, OSError):
        found = read_json(index.directory / "certificate.json")
        return found if isinstance(found, dict) and found.get("fingerprint") == index.fingerprint else None
    return None


def _verdict(certificate: dict[str, Any] | None, index: DatasetIndex) -> Html:
    if certificate is None:
        return paragraph("No certificate of this dataset lies here.", "quiet")
    said = certificate["verdict"]
    kind = "good" if said["sound"] else "bad"
    words = "certificate" if said["sound"] else f"certificate: {len(said['findings'])} to look at"
    examined = f" {said['words']}." if said["sound"] else ""
    mark = Html(f'<span class="mark {kind}">{words}</span>')
    told = bullets(said["findings"]) if said["findings"] else ""
    page = paragraph(joined("The whole certificate: ", word(str(index.directory / "certificate.html"))), "quiet")
    return joined(paragraph(joined(mark, examined)), told, page)


def _splits(index: DatasetIndex) -> Html:
    rows = [
        (split, f"{index.num_samples(split):,}", f"{index.num_unlabelled(split):,}", f"{len(shards):,}",
         bytes_in_words(sum(shard.bytes for shard in shards)))
        for split, shards in index.splits.items()
    ]  # fmt: skip
    return table(("split", "images", "unlabelled", "shards", "size"), rows, numbers=(1, 2, 3, 4))


def _classes(index: DatasetIndex) -> str:
    if not index.classes:
        return "none"
    more = len(index.classes) - CLASSES_NAMED
    named = ", ".join(index.classes[:CLASSES_NAMED]) + (f" and {more:,} more" if more > 0 else "")
    return f"{len(index.classes):,}: {named}"
