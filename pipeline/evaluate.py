"""One rank of an evaluation: `python -m pipeline.evaluate RUN_DIR`."""

import sys

from pipeline.rank import run_rank

if __name__ == "__main__":
    run_rank(sys.argv[1], "pipeline.evaluation.job:evaluate", stops_at_steps=False)
