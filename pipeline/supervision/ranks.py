"""What a supervisor does while its node's ranks run: it follows them, says so, and ends those that cannot go on."""

import contextlib
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.errors import EXIT_DONE, EXIT_STOPPED
from pipeline.run_directory import Attempt
from pipeline.supervision.judgement import Hang
from pipeline.supervision.liveness import BEAT_SECONDS, beat
from pipeline.supervision.nodes import Node, Peers, lost_seconds
from pipeline.supervision.orphans import IS_INIT, reap_orphans
from pipeline.supervision.pods import why_over
from pipeline.supervision.watchdog import Watchdog

GRACE_SECONDS = 15.0  # for the peers of a dead rank to see their broken collective and leave a record
LOOK_SECONDS = 0.5
LEAVE_SECONDS = 60.0  # that the verdict on ranks that hang is left to another node


@dataclass
class Supervision:
    """One node's ranks, from their start to their end."""

    ranks: Mapping[int, subprocess.Popen]
    attempt: Attempt
    watchdog: Watchdog
    node: Node = field(default_factory=Node)
    stop_asked: bool = False
    in_pod: bool = False  # nobody ends the pods of a start together: they end themselves where one is gone
    codes: dict[int, int] = field(default_factory=dict)  # return codes in the order the ranks ended
    hang: Hang | None = None  # what is to be said of those that had to be ended, if any had

    def __post_init__(self) -> None:
        self._started, self._failed_at, self._asked = time.time(), None, False
        self._peers, self._peers_asked_at = Peers(self.attempt, self.node, time.monotonic()), 0.0
        self._left_at, self._left_to = None, None

    def ask_to_stop(self) -> None:
        """Ask all ranks to stop with a checkpoint."""
        self.stop_asked = True
        for process in self.ranks.values():
            if process.poll() is None:
                process.send_signal(15)

    def wait(self) -> None:
        """Return when no rank is left.

        Once one fails, here or on another node, the others get a grace; they are ended too when the one behind all
        others does not move any more. Where one stopped, maybe before it met the others, they are asked to stop too.
        """
        beat_at = looked_at = float("-inf")
        pids = {rank: process.pid for rank, process in self.ranks.items()}
        while True:
            now, polled = time.monotonic(), {rank: process.poll() for rank, process in self.ranks.items()}
            self.codes |= {rank: c for rank, c in polled.items() if rank not in self.codes and c is not None}
            alive = {rank: pid for rank, pid in pids.items() if rank not in self.codes}
            if alive and now - looked_at > LOOK_SECONDS:
                looked_at = now
                self.watchdog.look(now)
                self._judge(alive, now)
            if IS_INIT:
                reap_orphans({process.pid for process in self.ranks.values()})
            ended = not alive or self.hang is not None
            if ended:
                self._end(alive)
            if ended or now - beat_at > self._beat_seconds(alive, now):  # the last one tells what the attempt cost
                beat_at = now
                places = self.watchdog.places(now)
                beat(self.attempt, self._started, pids, node=self.node.number, positions=places)
            if ended:
                return
            time.sleep(0.05)

    def _beat_seconds(self, alive: Mapping[int, int], now: float) -> float:
        """Between heartbeats: where ranks hang, other nodes can judge only by newer ones."""
        hung = self._peers and self.watchdog.hung(alive, now)
        return min(BEAT_SECONDS, self._peers_pause) if hung else BEAT_SECONDS

    @property
    def _peers_pause(self) -> float:
        """Seconds between two looks at the files of all other nodes."""
        return max(1.0, 0.02 * self.node.count)

    def _end(self, alive: Mapping[int, int]) -> None:
        for rank in alive:
            self.ranks[rank].kill()
            self.ranks[rank].wait()

    def _judge(self, alive: Mapping[int, int], now: float) -> None:
        """Set `hang` where the ranks that are left have to be ended."""
        if self._failed_at is None and any(code not in (EXIT_DONE, EXIT_STOPPED) for code in self.codes.values()):
            self._failed_at = now
        if not self._asked and EXIT_STOPPED in self.codes.values():
            self._asked = True
            self.ask_to_stop()
        if self._failed_at is not None and now - self._failed_at > GRACE_SECONDS:
            self.hang = Hang(self.watchdog.verdict(alive, now), self.node.host, certain=not self._peers)
        elif self._peers:
            with contextlib.suppress(OSError):  # their files cannot be read just now
                self._judge_with_peers(alive, now)
        elif self.watchdog.hung(alive, now):
            self.hang = Hang(self.watchdog.verdict(alive, now), self.node.host)

    def _judge_with_peers(self, alive: Mapping[int, int], now: float) -> None:
        """The same where a rank may wait for one of another node: what is wrong there is for that node to say."""
        standing, hung = self.watchdog.standing(alive, now)[1], self.watchdog.hung(alive, now)
        still, watching = standing > lost_seconds(), standing > lost_seconds() / 3
        if not hung:
            self._left_at = None
        pause = self._peers_pause
        if self.in_pod:
            pause = 2 * pause
        if not (hung or watching or self.stop_asked or self.in_pod) or now - self._peers_asked_at < pause:
            return
        self._peers_asked_at = now
        if self.in_pod and (reason := why_over(self.attempt)) is not None:
            self.hang = Hang(reason, certain=False)
            return
        if (self.stop_asked or hung or self.in_pod) and self._failed_at is None and self._peers.failure():
            self._failed_at = now
        if watching:
            self._peers.watch_next(now)
        if still:
            self.hang = self._peers.next_is_lost(now)
        if hung and self.hang is None:
            self.hang = self._hang_among_peers(alive, now)

    def _hang_among_peers(self, alive: Mapping[int, int], now: float) -> Hang | None:
        """What is to be said of ranks that hang here; None while it is another node's to say."""
        count, standing = self.watchdog.standing(alive, now)
        behind, complete = self._peers.furthest_behind(now, since=now - standing)
        is_here = behind is None or behind > count
        if not is_here and not (complete or behind < count):
            return None
        if behind == count:
            is_here = not self.watchdog.waits_for_peers(alive)
        if is_here:
            return Hang(self.watchdog.verdict(alive, now), self.node.host) if complete else None
        if self._left_at is None or self._left_to != behind:  # it moves, if slowly
            self._left_at, self._left_to = now, behind
        if now - self._left_at < LEAVE_SECONDS:
            return None
        reason = f"node {self.node.number} waited for other nodes, none of which said why"
        return Hang(f"{reason}: {self.watchdog.verdict(alive, now)}", certain=False)
