"""What the command line answers about models: which there are, where one comes from, and what it has seen."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.home import home_directory, tracking_uri
from pipeline.errors import EXIT_DONE, InputError
from pipeline.lineage.containment import Asker, answer_lines
from pipeline.lineage.matches import read_query
from pipeline.lineage.records import evaluations_of, registrations_of, version_facts
from pipeline.lineage.reproduction import reproduction
from pipeline.lineage.takedown import Descendants, places_of, take_down
from pipeline.lineage.trail import Node, Trail
from pipeline.lineage.tree import tree_lines
from pipeline.lineage.versions import registered_versions
from pipeline.registry.locate import locate_model
from pipeline.registry.versions import require_tracking_server
from pipeline.shards.index import read_index
from pipeline.storage.location import is_url, location

Say = Callable[..., None]
PROGRESS_SECONDS = 5.0  # between lines at least


def models_command(directory: str | None, say: Say) -> int:
    """A line per registered version."""
    home = home_directory(directory)
    versions = registered_versions(tracking_uri(home))
    for version in versions:
        say(version.in_words())
    if not versions:
        say(f"nothing is registered at {tracking_uri(home)}; vit register RUN --name NAME", error=True)
    return EXIT_DONE


def explain_command(
    model: str, as_json: bool, reproduce: bool, contains: str | None, directory: str | None, say: Say
) -> int:  # fmt: skip
    if reproduce and (as_json or contains):
        raise InputError("--reproduce prints commands; leave out --json and --contains")
    home = home_directory(directory)
    query = read_query(contains) if contains is not None else None
    node = explained(model, home)
    if query is not None:
        return _answer(node, Asker(query, home, _progress(say)), as_json, say)
    if reproduce:
        say(reproduction(node).rstrip("\n"))
    elif as_json:
        say(json.dumps(node, indent=2))
    else:
        for line in tree_lines(node):
            say(line)
    return EXIT_DONE


def explained(model: str, home: Path) -> Node:
    """The trail of a MODEL, with its scores and names; see `pipeline.lineage.trail`."""
    uri = tracking_uri(home)
    source = locate_model(model, tracking_uri=uri, home=home)
    records: dict[str, Any] = {"evaluations": evaluations_of(source.lineage, home)}
    records["registrations"] = registrations_of(source.lineage, home)
    registered = source.lineage.get("registered")
    records["version"] = version_facts(registered, uri) if registered and model.startswith("models:/") else None
    return Trail(home).of(source) | records


def _answer(node: Node, asker: Asker, as_json: bool, say: Say) -> int:
    answers = asker.answers(node)
    if as_json:
        say(json.dumps({"image": str(asker.query.path), "sha256": asker.query.sha256, "answers": answers}, indent=2))
        return EXIT_DONE
    for answer in answers:
        for line in answer_lines(answer):
            say(line)
    return EXIT_DONE


def _progress(say: Say) -> Callable[[str, int, int], None]:
    """Tells how far the hashing of a dataset is, on the error stream, from the fifth second on."""
    last = [time.monotonic()]

    def tell(name: str, done: int, total: int) -> None:
        if time.monotonic() - last[0] > PROGRESS_SECONDS:
            last[0] = time.monotonic()
            sys.stderr.write(f"{name}: {done:,} of {total:,} images hashed, once\n")

    return tell


def takedown_command(dataset: str, key: str, reason: str, directory: str | None, say: Say) -> int:
    """Put a key on the list, and name every model of this home that learned from it."""
    if not reason.strip() or "\n" in reason:
        raise InputError("--reason: say in one line why the sample is taken down, for whoever reads the list")
    home = home_directory(directory)
    index = read_index(location(dataset) if is_url(dataset) else Path(dataset).expanduser().absolute())
    places = places_of(index, key)
    require_tracking_server(tracking_uri(home))  # whoever learned from it is named, or nothing is taken down
    added = take_down(index, places, reason)
    splits = ", ".join(place.split for place in places)
    say(f"{key} (split {splits}) is on the tombstone list of {index.directory}" + ("" if added else " already"))
    say("runs that begin or resume from here on leave it out; its bytes stay in the tar")
    found = Descendants(home, tracking_uri(home)).of(index, places)
    for one in found:
        say(f"{one['model']}: {one['words']}")
    if not found:
        say("no run of this home and no registered version has learned from it")
    return EXIT_DONE
