"""Before the first step all ranks show that they are about to do the same thing; a rank that is not, is named.

Through a store at the process group's address, before any network is built: ranks of different models would hang in
their first collective until its time-out. Rank 0 compares, so a thousand ranks cost it a thousand small reads.
"""

import hashlib
import itertools
import json
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch.distributed import HashStore, Store, rendezvous

from pipeline.errors import InputError
from pipeline.rank import Rank
from pipeline.shards.index import DatasetIndex
from pipeline.training.engine import collective_time_out

PACKAGES = ("torch", "deepspeed", "accelerate", "timm", "numpy", "simplejpeg")
_rounds = itertools.count()  # ranks ask the same questions in the same order, in all runs of a sequence


def plan_parts(me: Rank, indexes: Sequence[DatasetIndex], first_step: int) -> dict[str, str]:
    """What must be equal on all ranks, by name: files of the run, data, code and packages, and the first step."""
    files = {path.name: _digest(path.read_bytes()) for path in (me.run.config_file, me.run.plan_file)}
    data = {f"data {index.directory}": index.fingerprint[:16] for index in indexes}
    packages = {package: version(package) for package in PACKAGES}
    return files | data | {"code": _code()} | packages | {"step": str(first_step), "world size": str(me.world_size)}


def _code() -> str:
    """A digest of the source that a rank runs."""
    root = Path(__file__).parents[2]
    sources = sorted(path for package in ("models", "pipeline") for path in (root / package).rglob("*.py"))
    return _digest(b"".join(str(path.relative_to(root)).encode() + path.read_bytes() for path in sources))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def open_store(me: Rank) -> Store:
    """A store that all ranks share before there is a process group. Collective.

    It must be kept while the run lasts: the process group is served at the same address.
    """
    if me.world_size == 1:
        return HashStore()
    store, _, _ = next(iter(rendezvous("env://", me.rank, me.world_size, timeout=collective_time_out())))
    return store


def in_the_words_of_rank_0(me: Rank, store: Store, own: Any, decide: Callable[[list[Any]], Any]) -> Any:
    """What rank 0 decides from what every rank has to say, `own`, in JSON. Collective."""
    place = f"vit/{next(_rounds)}"
    store.set(f"{place}/{me.rank}", json.dumps(own))
    if me.is_first:
        said = [json.loads(store.get(f"{place}/{rank}")) for rank in range(me.world_size)]
        store.set(f"{place}/decision", json.dumps(decide(said)))
    decision = json.loads(store.get(f"{place}/decision"))
    if store.add(f"{place}/told", 1) == me.world_size:
        store.set(f"{place}/all told", b"1")
    if me.is_first:
        store.wait([f"{place}/all told"])  # it serves the store: the others must have read before it leaves
    return decision


def require_same_plan(me: Rank, store: Store, parts: Mapping[str, str]) -> None:
    """Compare `parts` over all ranks; InputError on every rank where one differs. Collective."""
    own = {"host": platform.node(), "parts": parts}
    problems = in_the_words_of_rank_0(me, store, own, lambda said: differences(dict(enumerate(said))))
    if problems:
        raise InputError(*problems)


def differences(shown: Mapping[int, Mapping]) -> list[str]:
    """One line per rank that differs from most, or from rank 0 where there is no most."""
    texts = {rank: json.dumps(one["parts"], sort_keys=True) for rank, one in shown.items()}
    common, count = Counter(texts.values()).most_common(1)[0]
    expected = json.loads(common if count > len(shown) // 2 else texts[0])
    problems = []
    for rank, one in sorted(shown.items()):
        parts = one["parts"]
        differing = sorted(name for name in expected | parts if parts.get(name) != expected.get(name))
        if differing:
            told = ", ".join(f"{n} ({parts.get(n, 'none')}, not {expected.get(n, 'none')})" for n in differing)
            problems.append(
                f"rank {rank} on {one['host']} differs in {told}; start every rank from the same run directory, "
                "data and environment"
            )
    return problems
