"""One verdict of all nodes, behind them: `python -m pipeline.verdict RUN_DIR`, on the first node of a job.

It puts together what the supervisors of the attempt of $VIT_START left (the newest attempt's without one), writes
exit/verdict.json, prints the reason and ends with the code of the contract. A start whose supervisors began no attempt
leaves one all the same, that says why: what reads the newest attempt's verdict must not find an older start's.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.errors import EXIT_FAULT, EXIT_INPUT, FaultError, InputError
from pipeline.run_directory import Attempt, RunDirectory, look_afresh, read_json, write_json
from pipeline.supervision.nodes import Node, claimed_attempt, name_attempt, require_newest_start

VERDICT_SECONDS = 5.0  # for a verdict to be seen from here


def main(run_directory: str) -> int:
    run, start = RunDirectory(run_directory).require(), os.environ.get("VIT_START", "")
    attempt = attempt_of(run, start)
    if attempt is None:
        attempt = _attempt_that_did_not_begin(run, start)
    verdict = concluded(run, attempt)
    avoid = f" (node to avoid: {verdict['node']})" if verdict.get("node") else ""
    sys.stdout.write(f"attempt {attempt.number}: {verdict['reason']}{avoid}\n")
    return verdict["code"]


def attempt_of(run: RunDirectory, start: str) -> Attempt | None:
    """The attempt that a start made, or the newest where it has no name; None where it made none."""
    if not start:
        return run.attempt(run.last_attempt()) if run.last_attempt() else None
    for number in range(run.last_attempt(), 0, -1):
        attempt = run.attempt(number)
        if (read_json(attempt.meeting_file) or {}).get("start") == start:
            return attempt
    return None


def concluded(run: RunDirectory, attempt: Attempt) -> dict[str, Any]:
    """The verdict of an attempt whose supervisors have all ended, written where it was not yet."""
    verdict = read_json(attempt.path / "exit" / "verdict.json")
    if verdict is None:
        if attempt.meeting_file.exists():
            _wait_for_verdicts(attempt)
            code, reason, node = attempt.merged()
        else:
            said = attempt.verdict() or {"code": EXIT_FAULT, "reason": "its supervisor left no verdict"}
            code, reason, node = said["code"], said["reason"], None
        attempt.write_verdict(code, reason, node=node)
        verdict = attempt.verdict()
    return verdict


def _wait_for_verdicts(attempt: Attempt) -> None:
    """For a while, where some are missing: a node that ended well must not be blamed for a slow file system."""
    deadline = time.monotonic() + VERDICT_SECONDS
    while attempt.silent_nodes() and time.monotonic() < deadline:
        look_afresh(attempt.path / "exit")
        time.sleep(0.5)


def _attempt_that_did_not_begin(run: RunDirectory, start: str) -> Attempt:
    """One with a verdict and nothing else: that of the check of the nodes, where there was one."""
    if not start:
        raise InputError(f"{run.path}: it has no attempt yet, so there is nothing to conclude")
    require_newest_start(run, start)
    attempt, node = claimed_attempt(run), Node.here(os.environ, run.plan()["nodes"])
    write_json(attempt.meeting_file, {"start": start, "nodes": node.count, "ranks_per_node": 0, "hosts": None})
    name_attempt(run, node, attempt)
    found = read_json(run.node_checks(start) / "verdict.json") or {
        "code": EXIT_FAULT, "reason": f"no supervisor of start {start} began", "node": None,
    }  # fmt: skip
    attempt.write_verdict(found["code"], found["reason"], node=found["node"])
    return attempt


if __name__ == "__main__":
    try:
        sys.exit(main(str(Path(sys.argv[1]).absolute())))
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(EXIT_INPUT)
    except (FaultError, OSError, json.JSONDecodeError) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(EXIT_FAULT)
