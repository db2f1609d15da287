"""Before the first step all ranks show that they are about to do the same thing; a rank that is not, is named."""

import logging
import platform
from collections.abc import Mapping, Sequence

from torch.distributed import Store

from pipeline.config.data import DataConfig
from pipeline.environment import differences, digest, environment_parts
from pipeline.errors import InputError
from pipeline.loading.sources import Sources, open_sources
from pipeline.meeting import in_the_words_of_rank_0
from pipeline.rank import Rank
from pipeline.shards.index import DatasetIndex
from pipeline.shards.tombstones import tombstones_sha256

log = logging.getLogger(__name__)


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
    for index in sources.indexes:
        if index.tombstones:
            log.info(
                "%s: on its tombstone list: %d samples, for each of which the next of its shard stands in",
                index.directory, len(index.tombstones),
            )  # fmt: skip
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
    files = {path.name: digest(path.read_bytes()) for path in (me.run.config_file, me.run.plan_file)}
    data = {f"data {index.directory}": index.fingerprint[:16] for index in indexes}
    data |= {f"tombstones of {i.directory}": str(tombstones_sha256(i.tombstones))[:16] for i in indexes if i.tombstones}
    return files | data | environment_parts() | {"world size": str(me.world_size)}


def require_same_plan(me: Rank, store: Store, parts: Mapping[str, str]) -> None:
    """Compare `parts` over all ranks; InputError on every rank where one differs. Collective."""
    own = {"host": platform.node(), "parts": parts}
    problems = in_the_words_of_rank_0(me, store, own, problems_of)
    if problems:
        raise InputError(*problems)


def problems_of(said: Sequence[Mapping]) -> list[str]:
    """One line per rank that differs from most, or from rank 0 where there is no most."""
    return [
        f"rank {rank} on {said[rank]['host']} differs in {told}; start every rank from the same run directory, data "
        "and environment"
        for rank, told in differences({rank: one["parts"] for rank, one in enumerate(said)}).items()
    ]
