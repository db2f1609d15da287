"""The supervisor: one per node, started as `python -m pipeline.launch RUN_DIR`.

It starts the node's ranks with the five standard variables, forwards signals to them, and answers with one exit code
decided from their exit records. torchrun is not used: it loses exit codes and dies of SIGUSR1.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED, InputError
from pipeline.liveness import BEAT_SECONDS, beat, begin_by_hand
from pipeline.parenthood import STOP_SIGNALS, die_with_parent, stops_held
from pipeline.run_directory import Attempt, RunDirectory, verdict_of
from pipeline.watchdog import Watchdog, killed_for_memory

ENTRY_POINTS = {
    "pretrain": "pipeline.pretrain",
    "finetune": "pipeline.finetune",
    "evaluate": "pipeline.evaluate",
    "register": "pipeline.register",
    "sequence": "pipeline.sequence",
}
GRACE_SECONDS = 15.0  # for the peers of a dead rank to see their broken collective and leave a record
LOOK_SECONDS = 0.5


def main(run_directory: str) -> int:
    with stops_held():
        run = RunDirectory(run_directory).require()
        plan = run.plan()
        attempt = _begin_attempt(run)
        ranks = _start_ranks(run, plan, attempt)
        _forward_signals(ranks)
    killed_before = killed_for_memory()
    watchdog = Watchdog(attempt, ranks.keys(), time.monotonic())
    return_codes, hang = _wait(ranks, attempt, watchdog)
    watchdog.look(time.monotonic())  # where those were that ended since the last look
    places = {rank: position.in_words for rank, position in watchdog.positions.items()}
    records = [record for record in attempt.exit_records() if record.rank in ranks]
    code, reason = verdict_of(records, return_codes, hang=hang, places=places)
    if code == EXIT_FAULT and killed_for_memory() > killed_before and f"signal {signal.SIGKILL.value}" in reason:
        reason += "; the machine ran out of memory: lower micro_batch_size or profile.loader_workers"
    try:
        attempt.write_verdict(code, reason)
    except OSError as error:
        sys.stderr.write(f"{reason}; and the verdict could not be written: {error}\n")
    return code


def _begin_attempt(run: RunDirectory) -> Attempt:
    """The attempt that the submitter numbered, or the next one when this supervisor was started by hand."""
    given = os.environ.get("VIT_ATTEMPT")
    if given:
        return run.attempt(int(given)).make()
    return begin_by_hand(run)


def _start_ranks(run: RunDirectory, plan: dict, attempt: Attempt) -> dict[int, subprocess.Popen]:
    environment = environment_of_ranks(plan, os.environ) | {
        "WORLD_SIZE": str(plan["world_size"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "VIT_ATTEMPT": str(attempt.number),
    }
    ranks = {}
    for local_rank in range(plan["ranks_per_node"]):
        with open(attempt.log(local_rank), "ab") as log:
            ranks[local_rank] = subprocess.Popen(
                [sys.executable, "-m", ENTRY_POINTS[plan["stage"]], str(run.path)],
                env=environment | {"RANK": str(local_rank), "LOCAL_RANK": str(local_rank)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
            )
    return ranks


def environment_of_ranks(plan: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, str]:
    """What the ranks of a node share beside their meeting place, over `environment`; also of what measures for them."""
    hidden = {} if plan["accelerators_per_node"] else {"CUDA_VISIBLE_DEVICES": ""}
    threads = max(1, (os.cpu_count() or 1) // plan["ranks_per_node"])
    return {
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # retries of a store are no news
        # Threads beyond the cores of a rank slow every rank down, and threads that spin while they wait slow every
        # other job of the machine down: two jobs of two spinning threads on two cores ran 30 times slower.
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(threads),
        **environment,
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "DS_ACCELERATOR": "cuda" if plan["accelerators_per_node"] else "cpu",
        **hidden,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _forward_signals(ranks: dict[int, subprocess.Popen]) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: _ask_to_stop(ranks))


def _ask_to_stop(ranks: dict[int, subprocess.Popen]) -> None:
    for process in ranks.values():
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)


def _wait(
    ranks: dict[int, subprocess.Popen], attempt: Attempt, watchdog: Watchdog
) -> tuple[dict[int, int], str | None]:
    """Return codes in the order the ranks ended, and what is to be said of those that had to be ended, if any had.

    Once one fails the others get a grace; they are ended too when the one behind all others does not move any more.
    Where one stopped, maybe before it met the others, they are asked to stop as well.
    """
    codes: dict[int, int] = {}
    failed_at, asked, beat_at, looked_at, started = None, False, 0.0, 0.0, time.time()
    pids = {rank: process.pid for rank, process in ranks.items()}
    while True:
        now, polled = time.monotonic(), {rank: process.poll() for rank, process in ranks.items()}
        codes |= {rank: code for rank, code in polled.items() if rank not in codes and code is not None}
        alive = {rank: process.pid for rank, process in ranks.items() if rank not in codes}
        if not alive:
            return codes, None
        if failed_at is None and any(code not in (EXIT_DONE, EXIT_STOPPED) for code in codes.values()):
            failed_at = now
        if not asked and EXIT_STOPPED in codes.values():
            asked = True
            _ask_to_stop(ranks)
        if now - looked_at > LOOK_SECONDS:
            looked_at = now
            watchdog.look(now)
        if (failed_at is not None and now - failed_at > GRACE_SECONDS) or watchdog.hung(alive, now):
            hang = watchdog.verdict(alive, now)
            for rank in alive:
                ranks[rank].kill()
                ranks[rank].wait()
            return codes, hang
        if now - beat_at > BEAT_SECONDS:
            beat_at = now
            beat(attempt, started, pids)
        time.sleep(0.05)


if __name__ == "__main__":
    try:
        sys.exit(main(str(Path(sys.argv[1]).absolute())))
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(EXIT_FAULT)
