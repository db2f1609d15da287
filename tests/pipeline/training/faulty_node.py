"""A supervisor and its ranks, one of which the fault of $FAULT strikes: `RANK PHASE STEP STRIKE`, see `supervised`.

`python -m tests.pipeline.training.faulty_node RUN` is either, as its environment says.
"""

import os
import sys

from pipeline import launch
from pipeline.rank import run_rank
from tests.pipeline.training import supervised


def main(run: str) -> int:
    if "RANK" not in os.environ:
        launch.ENTRY_POINTS["pretrain"] = "tests.pipeline.training.faulty_node"
        return launch.main(run)
    rank, phase, step, strike = os.environ["FAULT"].split()
    if rank == os.environ["RANK"]:
        supervised.lay([supervised.Fault(int(rank), phase, int(step), getattr(supervised, strike))])
    run_rank(run, "pipeline.training.loop:train")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
