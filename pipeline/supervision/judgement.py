"""How an attempt ended: one code and one reason from what all its ranks and nodes left behind. Pure, torch-free.

Each rank leaves a record where it can, each supervisor what it saw of its node's ranks (`NodeVerdict`). A cause
outranks its consequences: one rank's exception breaks the collectives of all the others, on every node.
"""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_FAULT, EXIT_INPUT, EXIT_STOPPED

BROKEN_COLLECTIVE = "a collective broke"  # how a rank says that a peer was lost
BROKEN_DEVICE = "a device failed"  # how it says that its own is
OUT_OF_MEMORY = "the machine ran out of memory: lower micro_batch_size or profile.loader_workers"
_ASKED_TO_END = {-signal.SIGTERM, -signal.SIGINT, -signal.SIGUSR1}  # by which no machine is to blame


@dataclass(frozen=True)
class ExitRecord:
    """How one rank ended, in its own words."""

    rank: int
    code: int
    reason: str
    phase: str = ""
    step: int = -1


@dataclass(frozen=True)
class Hang:
    """What a supervisor says of ranks that it had to end. `avoid` is the host where the fault is, None if unknown.

    One that is not `certain` saw only that its ranks waited for others.
    """

    reason: str
    avoid: str | None = None
    certain: bool = True


@dataclass(frozen=True)
class NodeVerdict:
    """What one supervisor saw. `return_codes` in the order its ranks ended, without those that it had to end."""

    node: int
    host: str
    ranks: Sequence[int]
    return_codes: Mapping[int, int] = field(default_factory=dict)
    places: Mapping[int, str] = field(default_factory=dict)
    hang: Hang | None = None
    out_of_memory: bool = False
    time: float = 0.0

    @classmethod
    def of(cls, said: Mapping) -> "NodeVerdict":
        """From its JSON, whose keys are texts."""
        numbered = {
            name: {int(rank): value for rank, value in said[name].items()} for name in ("return_codes", "places")
        }
        hang = Hang(**said["hang"]) if said["hang"] else None
        names = ("node", "host", "ranks", "out_of_memory", "time")
        return cls(**{name: said[name] for name in names}, **numbered, hang=hang)


class Judgement(NamedTuple):
    """`rank` is the one named, None where it is none; `is_cause` is False where it was but the first to feel another's
    end."""

    code: int
    reason: str
    rank: int | None = None
    is_cause: bool = True
    is_hang: bool = False


def judge(
    records: Sequence[ExitRecord], return_codes: Mapping[int, int], *, hang: str | None = None,
    places: Mapping[int, str] | None = None,
) -> Judgement:  # fmt: skip
    """From the ranks' own records and their processes' codes, in the order they ended.

    A rank's own exception outranks a peer's broken collective; a rank that died without a word, `places` says where, is
    a fault. `hang` is what was found of ranks that had to be ended: they are not in `return_codes`.
    """
    by_rank = {record.rank: record for record in records}
    for code in (EXIT_INPUT, EXIT_FAILED):
        for record in records:
            if record.code == code:
                return Judgement(code, f"rank {record.rank}: {record.reason}", record.rank)
    silent = {rank: code for rank, code in return_codes.items() if rank not in by_rank}
    aborted = [rank for rank, code in silent.items() if code == -signal.SIGABRT]  # how gloo leaves when a peer is lost
    died = next((rank for rank in silent if rank not in aborted), None)
    if died is not None:
        return Judgement(EXIT_FAULT, _end_of(died, silent[died], places), died)
    faults = [record for record in records if record.code not in (EXIT_DONE, EXIT_STOPPED)]
    own = next((record for record in faults if not record.reason.startswith(BROKEN_COLLECTIVE)), None)
    if own:
        return Judgement(EXIT_FAULT, f"rank {own.rank}: {own.reason}", own.rank)
    if hang:
        return Judgement(EXIT_FAULT, hang, is_hang=True)
    if aborted:
        return Judgement(EXIT_FAULT, _end_of(aborted[0], silent[aborted[0]], places), aborted[0], is_cause=False)
    if faults:
        return Judgement(EXIT_FAULT, f"rank {faults[0].rank}: {faults[0].reason}", faults[0].rank, is_cause=False)
    if all(record.code == EXIT_DONE for record in records):
        return Judgement(EXIT_DONE, "done")
    return Judgement(EXIT_STOPPED, next(record.reason for record in records if record.code == EXIT_STOPPED))


def verdict_of(
    records: Sequence[ExitRecord], return_codes: Mapping[int, int], *, hang: str | None = None,
    places: Mapping[int, str] | None = None,
) -> tuple[int, str]:  # fmt: skip
    """The exit code and the reason of `judge`."""
    return judge(records, return_codes, hang=hang, places=places)[:2]


def _end_of(rank: int, code: int, places: Mapping[int, str] | None) -> str:
    where = f" {places[rank]}," if places and rank in places else ""
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return f"rank {rank} {how}{where} without an exit record"


def merged_verdict(
    records: Sequence[ExitRecord], nodes: Sequence[NodeVerdict], hosts: Mapping[int, str | None], ranks_per_node: int
) -> tuple[int, str, str | None]:
    """Code, reason and the host to avoid, of all nodes together. `hosts` has every node of the attempt, None: unknown.

    A node without a verdict, whose ranks have not all left a record, was killed or lost: it is the one named, unless
    something else explains its end.
    """
    by_time = sorted(nodes, key=lambda node: node.time)
    codes = {rank: code for node in by_time for rank, code in node.return_codes.items()}
    places = {rank: place for node in by_time for rank, place in node.places.items()}
    hang = min((node.hang for node in by_time if node.hang), key=lambda hang: not hang.certain, default=None)
    judged = judge(records, codes, hang=hang.reason if hang else None, places=places)
    spoke = {node.node for node in nodes}
    recorded = {record.rank for record in records}
    lost = [n for n in hosts if n not in spoke and not _ranks_of(n, ranks_per_node) <= recorded]
    explained = judged.code != EXIT_FAULT and judged.code not in (EXIT_DONE, EXIT_STOPPED)
    explained |= judged.code == EXIT_FAULT and (hang.certain if judged.is_hang and hang else judged.is_cause)
    if lost and not (records or codes or hang):
        return EXIT_FAULT, f"{_nodes_in_words(lost, hosts)} left no verdict: the job was killed", None
    if lost and not explained:
        avoid = hosts[lost[0]] if nodes else None
        return EXIT_FAULT, f"{_nodes_in_words(lost, hosts)} was lost: its supervisor left no verdict", avoid
    if judged.is_hang and hang:
        return judged.code, judged.reason, hang.avoid
    home = next((node for node in by_time if judged.rank in node.ranks), None)
    if judged.code != EXIT_FAULT or home is None or not judged.is_cause:
        return judged.code, judged.reason, None
    if home.out_of_memory and codes.get(judged.rank) == -signal.SIGKILL:
        return judged.code, f"{judged.reason}; {OUT_OF_MEMORY}", None
    of_device = judged.reason.startswith(f"rank {judged.rank}: {BROKEN_DEVICE}")
    died = judged.rank not in recorded and codes.get(judged.rank) not in _ASKED_TO_END
    return judged.code, judged.reason, home.host if of_device or died else None


def _ranks_of(node: int, ranks_per_node: int) -> set[int]:
    return set(range(node * ranks_per_node, (node + 1) * ranks_per_node))


def _nodes_in_words(nodes: Sequence[int], hosts: Mapping[int, str | None]) -> str:
    """`node 1 (gpu-17)`, and how many more."""
    first, *others = nodes
    name = f"node {first} ({hosts[first]})" if hosts[first] else f"node {first}"
    return f"{name}, as {len(others)} others," if others else name
