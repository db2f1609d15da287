"""Whether all nodes of a start can do the job: `python -m pipeline.node_check RUN_DIR`, once on each, before it.

Each node says what it is (code, packages, accelerators, clock, how fast it writes to the run directory); node 0 names
those that differ or lack something. Then all add up one buffer over the network. They meet by files in
RUN/preflight/START, once per start; the answer, verdict.json there, is given in less than a minute, also where a node
never comes.

Ends with 0; with 76 where some node is at fault, which the verdict names; with 2 where all are in the same way.
"""

import contextlib
import datetime
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.environment import differences, environment_parts
from pipeline.errors import EXIT_DONE, EXIT_FAULT, EXIT_INPUT, InputError
from pipeline.ports import free_port
from pipeline.run_directory import RunDirectory, look_afresh, read_json, write_json
from pipeline.supervision.liveness import host_name
from pipeline.supervision.nodes import Node

COME_SECONDS = 30.0  # for a node to come and say what it is
END_SECONDS = 52.0  # for all to be over; the last answer is given then
CLOCK_SECONDS = 5.0  # that clocks may differ: heartbeats are judged by them
LOOK_SECONDS = 2.0  # between two looks that a network file system must not answer from memory
WRITTEN_BYTES = 32 << 20
REDUCED_BYTES = 64 << 20
REDUCTIONS = 5
STAGES = ("importing torch", "meeting the others", "adding up", "done")


def main(run_directory: str) -> int:
    run = RunDirectory(run_directory).require()
    plan = run.plan()
    node = Node.here(os.environ, plan["nodes"])
    check = Check(run, plan, node)
    return check.lead() if node.number == 0 else check.follow()


class Check:
    """One node's part."""

    def __init__(self, run: RunDirectory, plan: Mapping[str, Any], node: Node):
        self.plan, self.node, self.began = plan, node, time.monotonic()
        self.looked = self.began
        self.folder = run.node_checks(node.start or "by hand")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.reduction = Reduction(node, cuda=plan["accelerators_per_node"] > 0)
        self.facts = facts_of(self.folder, node)

    def lead(self) -> int:
        meeting, opened = {"address": host_name(), "port": free_port("")}, time.time()
        write_json(self.folder / "meeting.json", meeting)
        self._say("node", self.facts | {"time": time.time()})
        shown, seen = self._gather("node", COME_SECONDS, enough=lambda said: True)
        faults = faults_of(shown, self.plan, self.node) + clock_faults(shown, opened, seen)
        for number, one in sorted(shown.items()):
            sys.stdout.write(
                f"node {number} ({one['host']}): {one['written'] / 2**20:.0f} MiB/s to the run directory\n"
            )
        if not faults and self.node.count > 1:
            write_json(self.folder / "go.json", {})
            self._reduce(meeting)
            reduced, _ = self._gather("reduction", END_SECONDS, enough=lambda said: said["stage"] == STAGES[-1])
            faults += reduction_faults(reduced, shown)
            self._tell_bandwidth(reduced)
        return self._conclude(faults)

    def follow(self) -> int:
        came = False
        while self._left(END_SECONDS + 3) > 0:
            if (verdict := read_json(self.folder / "verdict.json")) is not None:
                return verdict["code"]
            if not came and (meeting := read_json(self.folder / "meeting.json")) is not None:
                came = True
                self._say("node", self.facts | {"time": time.time()})
            if came and not self.reduction.begun and (self.folder / "go.json").exists():
                self._reduce(meeting)
            self._pause()
        host = dict(enumerate(self.node.hosts)).get(0, UNKNOWN)
        return self._conclude([(0, host, f"{'gave no answer' if came else 'did not come'} within {END_SECONDS:.0f} s")])

    def _left(self, seconds: float) -> float:
        return self.began + seconds - time.monotonic()

    def _say(self, name: str, said: Mapping[str, Any]) -> None:
        write_json(self.folder / f"{name}-{self.node.number:03d}.json", said)

    def _reduce(self, meeting: Mapping[str, Any]) -> None:
        def say(stage: str, seconds: float | None) -> None:
            self._say("reduction", {"stage": stage, "seconds": seconds})

        self.reduction.begin(meeting["address"], meeting["port"], self._left(END_SECONDS - 2), say)

    def _gather(
        self, name: str, seconds: float, *, enough: Callable[[dict], bool]
    ) -> tuple[dict[int, dict], dict[int, float]]:
        """What the nodes said within `seconds` of the start, and when each was heard, until all said `enough`."""
        said: dict[int, dict] = {}
        seen: dict[int, float] = {}
        waited_for = set(range(self.node.count))
        while waited_for and self._left(seconds) > 0:
            for number in sorted(waited_for):
                if (one := read_json(self.folder / f"{name}-{number:03d}.json")) is not None:
                    said[number] = one
                    seen.setdefault(number, time.time())
                    waited_for -= {number} if enough(one) else set()
            self._pause()
        return said, seen

    def _pause(self) -> None:
        time.sleep(0.1)
        if time.monotonic() - self.looked > LOOK_SECONDS:
            self.looked = time.monotonic()
            look_afresh(self.folder)

    def _tell_bandwidth(self, reduced: Mapping[int, dict]) -> None:
        seconds = [one["seconds"] for one in reduced.values() if one["seconds"]]
        if len(seconds) == self.node.count:
            exchanged = 2 * (self.node.count - 1) / self.node.count * REDUCED_BYTES  # over each node's link
            sys.stdout.write(
                f"all-reduce of {REDUCED_BYTES >> 20} MiB over {self.node.count} nodes: {max(seconds):.3f} s, "
                f"{exchanged / max(seconds) / 1e9:.2f} GB/s each\n"
            )
        elif reduced and all(one["stage"] == STAGES[0] for one in reduced.values()):
            sys.stdout.write("torch took too long to import everywhere: the all-reduce was left out\n")

    def _conclude(self, faults: list["Fault"]) -> int:
        """Write and print the verdict; its code."""
        lines = [f"node {number} ({host}): {words}" for number, host, words in faults]
        same = len(faults) == self.node.count and len({words for *_, words in faults}) == 1
        code = EXIT_DONE if not faults else EXIT_INPUT if same else EXIT_FAULT
        reason = f"check of the nodes: {'; '.join(lines) or 'all can do the job'}"
        avoid = faults[0][1] if code == EXIT_FAULT and faults[0][1] != UNKNOWN else None
        write_json(
            self.folder / "verdict.json", {"code": code, "reason": reason, "node": avoid, "time": time.time()}
        )  # fmt: skip
        sys.stdout.write("".join(f"{line}\n" for line in lines) or f"all {self.node.count} nodes can do the job\n")
        return code


UNKNOWN = "unknown host"
Fault = tuple[int, str, str]  # node, host, what is wrong


def facts_of(folder: Path, node: Node) -> dict[str, Any]:
    """What this node is: host, code and packages, accelerators, and bytes per second to the run directory."""
    return {
        "host": node.host,
        "parts": environment_parts(),
        "accelerators": accelerators_seen(),
        "written": writing_speed(folder / f"node-{node.number:03d}.bytes"),
    }


def accelerators_seen() -> int:
    """NVIDIA devices that this node's driver shows to this job."""
    if shutil.which("nvidia-smi") is None:
        return 0
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    shown = sum(line.startswith("GPU ") for line in done.stdout.splitlines()) if done.returncode == 0 else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return shown if visible is None else min(shown, len([part for part in visible.split(",") if part.strip()]))


def writing_speed(path: Path) -> float:
    """Bytes per second of one file, until the file system says that it has them."""
    content = os.urandom(WRITTEN_BYTES)
    began = time.perf_counter()
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return WRITTEN_BYTES / (time.perf_counter() - began)
    finally:
        path.unlink(missing_ok=True)


def faults_of(shown: Mapping[int, Mapping], plan: Mapping[str, Any], node: Node) -> list[Fault]:
    """Nodes that did not come, and those that differ from the others or lack what the plan needs."""
    hosts = {number: one["host"] for number, one in shown.items()}
    odd = differences({number: one["parts"] for number, one in shown.items()})
    faults = []
    for number in range(node.count):
        host = hosts.get(number) or dict(enumerate(node.hosts)).get(number, UNKNOWN)
        if number not in shown:
            faults.append((number, host, f"did not come within {COME_SECONDS:.0f} s"))
            continue
        missing = [name for name, value in shown[number]["parts"].items() if value == "none"]
        if missing:
            faults.append((number, host, f"has no {', '.join(missing)}; install the environment there"))
        elif number in odd:
            faults.append((number, host, f"differs in {odd[number]}"))
        if (found := shown[number]["accelerators"]) < plan["accelerators_per_node"]:
            faults.append((number, host, f"shows {found} accelerators, the plan needs {plan['accelerators_per_node']}"))
    return faults


def clock_faults(shown: Mapping[int, Mapping], opened: float, seen: Mapping[int, float]) -> list[Fault]:
    """Nodes whose clock was not between that of node 0 when it opened the meeting, and when it heard of them."""
    faults = []
    for number, one in sorted(shown.items()):
        off = max(opened - one["time"], one["time"] - seen[number])
        if off > CLOCK_SECONDS:
            way = "behind" if one["time"] < opened else "ahead of"
            faults.append((number, one["host"], f"its clock is {off:.0f} s {way} node 0's; synchronise it"))
    return faults


def reduction_faults(reduced: Mapping[int, Mapping], shown: Mapping[int, Mapping]) -> list[Fault]:
    """The nodes that came less far than others; where all stopped at one place, no node is to blame alone."""
    stages = {number: STAGES.index(reduced[number]["stage"]) if number in reduced else 0 for number in shown}
    last = max(stages.values())
    behind = [number for number in shown if stages[number] < last]
    if last == 0 or (not behind and last == len(STAGES) - 1):
        return []
    if behind:
        return [(n, shown[n]["host"], f"all-reduce: still {STAGES[stages[n]]} at the end") for n in behind]
    return [(0, UNKNOWN, f"all-reduce: all nodes still {STAGES[last]} at the end")]


class Reduction:
    """One buffer added up over all nodes, in a thread: a call of torch cannot be given up."""

    def __init__(self, node: Node, *, cuda: bool):
        self.node, self.cuda, self.begun = node, cuda, False
        if node.count > 1:
            threading.Thread(target=_import_torch, daemon=True).start()  # seconds, while the others are waited for

    def begin(self, address: str, port: int, seconds: float, say: Callable[[str, float | None], None]) -> None:
        self.begun = True
        threading.Thread(target=self._run, args=(address, port, seconds, say), daemon=True).start()

    def _run(self, address: str, port: int, seconds: float, say: Callable[[str, float | None], None]) -> None:
        say(STAGES[0], None)
        _import_torch()
        import torch
        import torch.distributed as dist

        say(STAGES[1], None)
        device = torch.device("cuda", 0) if self.cuda else torch.device("cpu")
        with contextlib.suppress(RuntimeError):  # of a node that is not there: the stage says it
            dist.init_process_group(
                "nccl" if self.cuda else "gloo", init_method=f"tcp://{address}:{port}", rank=self.node.number,
                world_size=self.node.count, timeout=datetime.timedelta(seconds=max(1.0, seconds)),
            )  # fmt: skip
            say(STAGES[2], None)
            buffer = torch.zeros(REDUCED_BYTES // 4, device=device)
            dist.all_reduce(buffer)  # connects
            best = min(self._timed(buffer) for _ in range(REDUCTIONS))
            say(STAGES[3], best)

    def _timed(self, buffer: Any) -> float:
        import torch
        import torch.distributed as dist

        began = time.perf_counter()
        dist.all_reduce(buffer)
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began


def _import_torch() -> None:
    with contextlib.suppress(ImportError):  # said by `environment_parts`
        import torch.distributed  # noqa: F401


if __name__ == "__main__":
    code = EXIT_FAULT
    try:
        code = main(str(Path(sys.argv[1]).absolute()))
    except InputError as error:
        code = EXIT_INPUT
        sys.stderr.write(f"{error}\n")
    except OSError as error:
        sys.stderr.write(f"{host_name()}: {error}\n")
    sys.stdout.flush()
    os._exit(code)  # a thread may hang in a collective
