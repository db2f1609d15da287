"""The supervisor of a node over ranks from the pool, one of which a fault strikes.

`python -m tests.pipeline.training.faulty_node RUN RANK PHASE STEP STRIKE`, STRIKE a function of `supervised`.
"""

import multiprocessing
import sys
from functools import partial
from multiprocessing import forkserver

from pipeline import launch
from tests.pipeline.training import supervised
from tests.ranks import PRELOAD


def main(run: str, rank: str, phase: str, step: str, strike: str) -> int:
    multiprocessing.set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()
    fault = supervised.Fault(int(rank), phase, int(step), getattr(supervised, strike))
    launch._start_ranks = partial(supervised.start_from_pool, faults=(fault,))
    return launch.main(run)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
