"""Was an image in the training data of a model or of its ancestors, and when was it read?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, FaultError, InputError
from pipeline.lineage.consumption import Consumption
from pipeline.lineage.datasets import Datasets
from pipeline.lineage.matches import HOW, Match, Query, find_image
from pipeline.lineage.trail import Node, ancestors
from pipeline.loading.sources import Sources

Answer = dict[str, Any]  # {model, role, answer: yes|no|unknown, reason, samples, matches: [...]}


class Asker:
    """Asks models about one image; each dataset is looked through once, and each copy of it in other shards."""

    def __init__(self, query: Query, home: Path, progress: Callable[[str, int, int], None] | None = None):
        self.query, self.cache, self.datasets = query, home / "cache", Datasets(home)
        self.progress = progress or (lambda name, done, total: None)
        self._found: dict[tuple[str, str], tuple[list[Match], int]] = {}  # by content, and by the shards it lies in

    def answers(self, node: Node) -> list[Answer]:
        """Of the model and each of its ancestors, nearest first."""
        return [self.answer(one) for one in ancestors(node)]

    def answer(self, node: Node) -> Answer:
        answer: Answer = {
            "model": node["registered"] or node["model"], "role": node["role"], "answer": "unknown", "reason": None,
            "samples": 0, "unread": 0, "matches": [],
        }  # fmt: skip
        if node["reading"] is None:
            return answer | {"reason": "; ".join(node["notes"]) or "what it was trained on is not recorded"}
        try:
            consumption = opened(node, self.datasets)
            for number, index in enumerate(consumption.indexes):
                found, unread = self._look(index)
                answer["unread"] += unread
                answer["samples"] += index.num_samples(consumption.config.data.split)
                answer["matches"] += [_matched(consumption, number, match) for match in found]
        except (InputError, DataError, FaultError) as error:
            return answer | {"reason": str(error).splitlines()[0]}
        if node["reading"]["damaged"]:
            answer["reason"] = (
                f"{node['reading']['damaged']} damaged samples were replaced by the next of their shards on the way, "
                "which the steps here do not know of"
            )
        return answer | {"answer": "yes" if any(match["steps"] for match in answer["matches"]) else "no"}

    def _look(self, index: Any) -> tuple[list[Match], int]:
        copy = index.fingerprint, Sources((index,)).shards_sha256
        if copy not in self._found:
            name = str(index.directory)
            self._found[copy] = find_image(
                self.query, index, self.cache, lambda done, total: self.progress(name, done, total)
            )
        return self._found[copy]


def opened(node: Node, datasets: Datasets) -> Consumption:
    """What a node's run read. InputError where one of its datasets is not reachable as it was."""
    reading, indexes = node["reading"], []
    if len(node["data"]) != len(reading["config"]["data"]["sources"]):
        raise InputError("not all of its datasets are recorded")
    for one in node["data"]:
        index, found = datasets.find(one["path"], one["fingerprint"])
        if index is None:
            raise InputError(f"its dataset {one['name']}, fingerprint {one['fingerprint'][:12]}, is {found}"
                             if found.startswith("not reachable") else f"its dataset is not here: {found}")  # fmt: skip
        indexes.append(index)
    shards = Sources(tuple(indexes)).shards_sha256
    if reading.get("shards_sha256") not in (None, shards):
        raise InputError(f"{indexes[0].directory}: holds the same images in other shards, so positions mean others")
    return Consumption(reading, indexes)


def _matched(consumption: Consumption, source: int, match: Match) -> dict[str, Any]:
    """One match as JSON, with the steps that read it, and in words why there are none."""
    index, trained_on = consumption.indexes[source], consumption.config.data.split
    facts = {
        "how": match.how, "explained": HOW[match.how], "dataset": str(index.directory),
        "fingerprint": index.fingerprint, "split": match.split, "key": match.key, "sha256": match.sha256,
        "shard": index.shards(match.split)[match.shard].name, "distance": round(match.distance, 2),
        "epochs": [], "steps": [],
    }  # fmt: skip
    where = f"{match.in_words()} of dataset {index.directory.name} ({index.fingerprint[:12]}), split {match.split}"
    if match.split != trained_on:
        return facts | {"words": f"{where}: not trained on, which was split {trained_on}"}
    if not consumption.takes_part(source, match.shard, match.sample):
        data = consumption.config.data
        most = "" if data.max_samples is None else f" and data.max_samples={data.max_samples}"
        return facts | {"words": f"{where}: not chosen by data.label_fraction={data.label_fraction:g}{most}"}
    seen = consumption.seen(source, match.shard, match.sample)
    if not seen.steps:
        return facts | {"words": f"{where}: not read in the {consumption.step:,} steps of this model"}
    return facts | {"epochs": seen.epochs, "steps": seen.steps, "words": f"{where}; {seen.in_words()}"}


def answer_lines(answer: Answer) -> list[str]:
    """For a person: yes, no, or why it cannot be told; and each match."""
    who = f"{answer['role']} {answer['model']}"
    if answer["answer"] == "unknown":
        return [f"{who}: cannot be answered: {answer['reason']}"]
    matches = [match["words"] for match in answer["matches"]]
    unread = f" ({answer['unread']} samples could not be read)" if answer["unread"] else ""
    if answer["answer"] == "no":
        samples = f"{answer['samples']:,} samples of what it learned from"
        said = f"it is among the {samples}, and was not read" if matches else f"none of the {samples} is this image"
        first = f"{who}: no: {said}{unread}"
    else:
        first = f"{who}: yes{unread}"
    notes = [f"  {answer['reason']}"] if answer["reason"] else []
    return [first, *(f"  {words}" for words in matches), *notes]
