"""Where ranks meet before there is a process group: a store at its address, through which rank 0 decides for all.

Ranks of different models or plans would hang in their first collective until its time-out; here each says what it has,
and hears of a stop while it waits. A thousand ranks cost rank 0 a thousand small reads.
"""

import datetime
import itertools
import json
import os
import time
from collections.abc import Callable
from typing import Any

from torch.distributed import DistNetworkError, DistStoreError, HashStore, Store, TCPStore

from pipeline.errors import FaultError
from pipeline.rank import Rank, Stopped
from pipeline.supervision.watchdog import collective_time_out

_rounds = itertools.count()  # ranks ask the same questions in the same order, in all runs of a sequence


def open_store(me: Rank) -> Store:
    """A store that all ranks share before there is a process group. Collective.

    As torch's own rendezvous makes it, but without waiting for all. It must be kept while the run lasts: the process
    group is served at the same address. Raises Stopped, here and below, where a stop is asked for meanwhile.
    """
    if me.world_size == 1:
        return HashStore()
    served_elsewhere = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun
    return _patiently(
        me, "no store at MASTER_ADDR",
        lambda spell: TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), me.world_size,
            is_master=me.is_first and not served_elsewhere, timeout=spell, wait_for_workers=False, multi_tenant=True,
        ),
    )  # fmt: skip


def in_the_words_of_rank_0(me: Rank, store: Store, own: Any, decide: Callable[[list[Any]], Any]) -> Any:
    """What rank 0 decides from what every rank has to say, `own`, in JSON. Collective."""
    try:
        return _decision_of_rank_0(me, store, own, decide)
    except (DistStoreError, DistNetworkError):
        if me.stop_requested:  # and so was rank 0, which served the store
            raise Stopped("stopped on request before the first step") from None
        raise


def _decision_of_rank_0(me: Rank, store: Store, own: Any, decide: Callable[[list[Any]], Any]) -> Any:
    place = f"vit/{next(_rounds)}"
    store.set(f"{place}/{me.rank}", json.dumps(own))
    if me.is_first:
        said = [json.loads(_waited_for(me, store, f"{place}/{rank}")) for rank in range(me.world_size)]
        store.set(f"{place}/decision", json.dumps(decide(said)))
    decision = json.loads(_waited_for(me, store, f"{place}/decision"))
    if store.add(f"{place}/told", 1) == me.world_size:
        store.set(f"{place}/all told", b"1")
    if me.is_first:
        _waited_for(me, store, f"{place}/all told")  # it serves the store: the others must have read before it leaves
    return decision


def stop_together(me: Rank, store: Store) -> None:
    """Raise Stopped on every rank where one was asked to stop. Collective."""
    if in_the_words_of_rank_0(me, store, me.stop_requested, any):
        raise Stopped("stopped on request before the first step")


def _waited_for(me: Rank, store: Store, key: str) -> bytes:
    """The value of a key that another rank sets."""
    _patiently(me, f"no {key}", lambda spell: store.wait([key], spell))
    return store.get(key)


def _patiently(me: Rank, lack: str, attempt: Callable[[datetime.timedelta], Any]) -> Any:
    """What `attempt` returns, tried in short spells, as calls of torch do not hear of a stop; FaultError in the end."""
    deadline = time.monotonic() + collective_time_out().total_seconds()
    while True:
        try:
            return attempt(datetime.timedelta(seconds=2))
        except (DistStoreError, DistNetworkError) as error:
            if me.stop_requested:
                raise Stopped("stopped on request before the first step") from None
            if time.monotonic() > deadline:
                raise FaultError(f"{lack} before the first step: {str(error).splitlines()[0]}") from None
