"""The supervisor: one per node, started as `python -m pipeline.launch RUN_DIR`.

It meets those of the other nodes, starts the node's ranks with the five standard variables, forwards signals to them,
and answers with one exit code decided from their exit records. torchrun is not used: it loses exit codes and dies of
SIGUSR1.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED, FaultError, InputError
from pipeline.parenthood import STOP_SIGNALS, die_with_parent, stops_held
from pipeline.ports import free_port
from pipeline.run_directory import Attempt, RunDirectory
from pipeline.supervision.judgement import OUT_OF_MEMORY, NodeVerdict, judge
from pipeline.supervision.liveness import FRESH_SECONDS, begin_by_hand, host_name
from pipeline.supervision.nodes import Meeting, Node, StoppedBeforeMeeting, join, lead, require_newest_start
from pipeline.supervision.pods import Finished, Pod, code_of_all, meet
from pipeline.supervision.ranks import GRACE_SECONDS, Supervision
from pipeline.supervision.watchdog import Watchdog, killed_for_memory
from pipeline.verdict import concluded

ENTRY_POINTS = {
    "pretrain": "pipeline.pretrain",
    "finetune": "pipeline.finetune",
    "evaluate": "pipeline.evaluate",
    "register": "pipeline.register",
    "inspect": "pipeline.inspect_model",
    "embed": "pipeline.embed",
    "export": "pipeline.export_model",
    "sequence": "pipeline.sequence",
}


def main(run_directory: str) -> int:
    with _progress_folder() as folder:
        with stops_held():
            run = RunDirectory(run_directory).require()
            pod = Pod.here(os.environ, run.plan().get("nodes", 1))
            if pod is None:
                node = Node.here(os.environ, run.plan().get("nodes", 1))
                meeting = _begin(run, node)
            else:
                meeting, node = _begin_in_pod(run, pod)
            plan = run.plan()  # after the meeting: node 0 may have made another
            progress = folder if node.count > 1 else None
            ranks = _start_ranks(run, plan, meeting, node, progress)
            watchdog = Watchdog(meeting.attempt, ranks.keys(), time.monotonic(), progress)
            supervision = Supervision(ranks, meeting.attempt, watchdog, node, in_pod=pod is not None)
            for number in STOP_SIGNALS:
                signal.signal(number, lambda number, frame: supervision.ask_to_stop())
        killed_before = killed_for_memory()
        supervision.wait()
        watchdog.look(time.monotonic())  # where those were that ended since the last look
        code = _conclude(supervision, out_of_memory=killed_for_memory() > killed_before)
        return code if pod is None else _conclude_with_all(meeting.attempt, node, code)


@contextlib.contextmanager
def _progress_folder() -> Iterator[Path]:
    """On the node's own disk: the ranks of a thousand nodes must not write to a shared one all the time."""
    with tempfile.TemporaryDirectory(prefix="vit-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _conclude(supervision: Supervision, *, out_of_memory: bool) -> int:
    """Write the verdict on this node's ranks, or on the run where there is no other node; its code."""
    attempt, node, codes = supervision.attempt, supervision.node, supervision.codes
    places = {rank: position.in_words for rank, position in supervision.watchdog.positions.items()}
    records = [record for record in attempt.exit_records() if record.rank in supervision.ranks]
    hang = supervision.hang
    judged = judge(records, codes, hang=hang.reason if hang else None, places=places)
    reason = judged.reason
    if out_of_memory and judged.code == EXIT_FAULT and f"signal {signal.SIGKILL.value}" in reason:
        reason += f"; {OUT_OF_MEMORY}"
    seen = NodeVerdict(
        node.number, node.host, [*supervision.ranks], codes, places, hang, out_of_memory, time.time()
    )  # fmt: skip
    try:
        if node.start:
            attempt.write_node_verdict(seen, judged.code, reason)
        else:
            attempt.write_verdict(judged.code, reason)
    except OSError as error:
        sys.stderr.write(f"{reason}; and the verdict could not be written: {error}\n")
    if node.start:
        sys.stderr.write(f"node {node.number} ({node.host}): {reason}\n")
    return judged.code


def _begin(run: RunDirectory, node: Node) -> Meeting:
    """The attempt that this start makes: the one a local controller numbered, else the next one.

    That is of all nodes of a cluster's start, or of this supervisor alone when it was started by hand.
    """
    given = os.environ.get("VIT_ATTEMPT")
    if given:
        return Meeting(run.attempt(int(given)).make(), "127.0.0.1", free_port())
    plan = run.plan()
    if not node.start and plan.get("nodes", 1) > 1:
        raise InputError(
            f"{run.plan_file}: planned for {plan['nodes']} nodes; start one supervisor on each, with one and the same "
            "VIT_START, or submit the run by `vit resume`"
        )
    if not node.start:
        return Meeting(begin_by_hand(run), "127.0.0.1", free_port())
    if node.number:
        return join(run, node)
    require_newest_start(run, node.start)  # before anything of the run is changed
    if plan["nodes"] != node.count:
        from pipeline.preparation.replan import replan  # costs half a second, and only here

        plan = replan(run, node.count)
    return lead(run, node, plan["ranks_per_node"])


def _begin_in_pod(run: RunDirectory, pod: Pod) -> tuple[Meeting, Node]:
    """The attempt on which the pods of this start agree, planned anew by the first where other nodes are there."""
    if run.result_file.is_file():
        raise Finished(f"{run.path}: the run is done")
    plan = run.plan()

    def replanned(count: int) -> None:
        if run.plan().get("nodes", count) != count:
            from pipeline.preparation.replan import replan

            replan(run, count)

    return meet(run, pod, host_name(), plan["ranks_per_node"], replanned)


def _conclude_with_all(attempt: Attempt, node: Node, own: int) -> int:
    """The code of all pods; the first one writes their verdict."""
    code, reason = code_of_all(attempt, FRESH_SECONDS if own in (EXIT_DONE, EXIT_STOPPED) else 1.3 * GRACE_SECONDS)
    if node.number == 0:
        concluded(RunDirectory(attempt.path.parents[1]), attempt)
    if code != own:
        sys.stderr.write(f"all pods of attempt {attempt.number}: {reason}\n")
    return code


def _start_ranks(
    run: RunDirectory, plan: dict, meeting: Meeting, node: Node, progress: Path | None
) -> dict[int, subprocess.Popen]:
    shared, ranks = environment_of_ranks(plan, os.environ), {}
    for local_rank in range(plan["ranks_per_node"]):
        own = variables_of_rank(plan, meeting, node, local_rank, progress)
        rank = int(own["RANK"])
        with open(meeting.attempt.log(rank), "ab") as log:
            ranks[rank] = subprocess.Popen(
                [sys.executable, "-m", ENTRY_POINTS[plan["stage"]], str(run.path)],
                env=shared | own,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
            )
    return ranks


def variables_of_rank(
    plan: Mapping[str, Any], meeting: Meeting, node: Node, local_rank: int, progress: Path | None
) -> dict[str, str]:
    """A rank's place in the world, where it meets the others, and where it says how far it is."""
    return {
        "RANK": str(node.number * plan["ranks_per_node"] + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(plan["world_size"]),
        "MASTER_ADDR": meeting.address,
        "MASTER_PORT": str(meeting.port),
        "VIT_ATTEMPT": str(meeting.attempt.number),
        **({"VIT_PROGRESS": str(progress)} if progress else {}),
    }


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


if __name__ == "__main__":
    try:
        sys.exit(main(str(Path(sys.argv[1]).absolute())))
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    except Finished as finished:
        sys.stdout.write(f"{finished}\n")
        sys.exit(EXIT_DONE)
    except StoppedBeforeMeeting as stopped:
        sys.stderr.write(f"{stopped}\n")
        sys.exit(EXIT_STOPPED)
    # What nodes share may be read damaged: that is a fault of the machinery, which is tried again.
    except (FaultError, OSError, json.JSONDecodeError) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(EXIT_FAULT)
