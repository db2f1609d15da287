"""Functions run on real ranks: processes from a forkserver that has torch, DeepSpeed and timm loaded once."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

from pipeline.ports import free_port

PRELOAD = ["torch", "timm", "deepspeed", "accelerate", "deepspeed.runtime.zero.muon.muon_optimizer",
           "pipeline.training.loop"]  # fmt: skip


def run_on_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout_seconds: float = 180
) -> list[Any]:
    """`function(*arguments)` on every rank, the five variables set; what each returned, in rank order.

    `function` is importable, and its arguments and results can be pickled. An exception on a rank is raised here.
    """
    ranks, queue = start_on_ranks(function, world_size, *arguments)
    try:
        answers = dict(queue.get(timeout=timeout_seconds) for _ in ranks)
    finally:
        for process in ranks:
            process.join(timeout=5)
            process.kill()
    for rank in range(world_size):
        ok, value = answers[rank]
        assert ok, f"rank {rank}:\n{value}"
    return [answers[rank][1] for rank in range(world_size)]


def start_on_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> tuple[list[Any], Any]:
    """The processes that run `function(*arguments)` on every rank, and the queue of (rank, (ok, answer))."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    queue, port = context.Queue(), free_port()
    ranks = [
        context.Process(target=_rank, args=(function, rank, world_size, port, arguments, queue))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    return ranks, queue


def _rank(function, rank: int, world_size: int, port: int, arguments: tuple, queue) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    import torch

    torch.set_num_threads(1)
    try:
        queue.put((rank, (True, function(*arguments))))
    except BaseException:
        queue.put((rank, (False, traceback.format_exc())))
    queue.close()
    queue.join_thread()
    os._exit(0)
