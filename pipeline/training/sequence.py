"""Several training runs one after the other in one set of processes: start-up is paid once."""

from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.config.stages import read_run_config
from pipeline.errors import EXIT_DONE
from pipeline.rank import Rank
from pipeline.run_directory import RunDirectory, read_json, write_json
from pipeline.supervision.judgement import ExitRecord
from pipeline.supervision.watchdog import collective_time_out
from pipeline.training.loop import train


def train_all(me: Rank) -> None:
    """Train each run that is not done yet; each writes its own attempt, as if it ran alone. Collective."""
    job_file = me.run.job_file
    for path in read_run_config(me.run.path).runs:
        run = RunDirectory(path)
        if read_json(run.result_file) is not None:
            continue
        attempt = run.attempt(_shared_attempt_number(me, run, job_file)).make()
        me.run, me.attempt, me.step = run, attempt, -1  # the same rank, so that a request to stop reaches each run
        train(me)
        attempt.write_exit(ExitRecord(me.rank, EXIT_DONE, "done", me.phase, me.step))
        if me.is_first:
            write_json(attempt.path / "exit" / "verdict.json", {"code": EXIT_DONE, "reason": "done"})


def _shared_attempt_number(me: Rank, run: RunDirectory, job_file: Path) -> int:
    """The next attempt's number, decided by rank 0 and written to job.json, so that its checkpoints may commit."""
    number = run.last_attempt() + 1
    if me.world_size > 1:
        if not dist.is_initialized():
            cuda = torch.cuda.is_available()
            if cuda:
                torch.cuda.set_device(me.local_rank)  # else each rank's first collective is on the first device
            dist.init_process_group("nccl" if cuda else "gloo", timeout=collective_time_out())
        agreed = [number]
        dist.broadcast_object_list(agreed)
        number = agreed[0]
    if me.is_first:
        job = read_json(job_file) or {"kind": "by hand", "id": "", "key": ""}
        write_json(run.job_file, job | {"key": run.key, "attempt": number})
    return number
