"""Before the first step all ranks show that they are about to do the same thing; a rank that is not, is named."""

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from torch.distributed import Store

from pipeline.config.data import DataConfig
from pipeline.errors import InputError
from pipeline.loading.sources import Sources, open_sources
from pipeline.meeting import in_the_words_of_rank_0
from pipeline.rank import Rank
from pipeline.shards.index import DatasetIndex

PACKAGES = ("torch", "deepspeed", "accelerate", "timm", "numpy", "simplejpeg")


def open_agreed_sources(me: Rank, store: Store, data: DataConfig, plan: Mapping) -> Sources:
    """The run's datasets, once all ranks have shown that they start from the same ones and in the same way. Collective.

    InputError on every rank where one differs, or cannot open what the others can.
    """
    problem, sources = None, None
    try:
        sources = open_sources(data)
        require_planned_data(sources, plan)
    except InputError as error:  # to be told to the other ranks, who may be able to
        problem = error
    parts = plan_parts(me, sources.indexes if sources else ())
    require_same_plan(me, store, parts | ({"data": f"refused: {problem}"} if problem else {}))
    if problem:
        raise problem
    return sources


def require_planned_data(sources: Sources, plan: Mapping) -> None:
    """The same samples in the same shards: else positions would mean other samples than before."""
    for what, found in (("fingerprint", sources.fingerprint), ("shards_sha256", sources.shards_sha256)):
        if plan["data"].get(what, found) != found:
            raise InputError(
                f"{sources.path}: the dataset changed since this run began: its {what} is {found}, the run was "
                f"planned on {plan['data'][what]}; restore that dataset, or start a new run on this one"
            )


def plan_parts(me: Rank, indexes: Sequence[DatasetIndex]) -> dict[str, str]:
    """What must be equal on all ranks, by name: files of the run, data, code and packages."""
    files = {path.name: _digest(path.read_bytes()) for path in (me.run.config_file, me.run.plan_file)}
    data = {f"data {index.directory}": index.fingerprint[:16] for index in indexes}
    packages = {package: version(package) for package in PACKAGES}
    return files | data | {"code": _code()} | packages | {"world size": str(me.world_size)}


def _code() -> str:
    """A digest of the source that a rank runs."""
    root = Path(__file__).parents[2]
    sources = sorted(path for package in ("models", "pipeline") for path in (root / package).rglob("*.py"))
    return _digest(b"".join(str(path.relative_to(root)).encode() + path.read_bytes() for path in sources))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


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
