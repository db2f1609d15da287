"""One rank of several training runs in a row: `python -m pipeline.sequence RUN_DIR`."""

import sys

from pipeline.rank import run_rank

if __name__ == "__main__":
    run_rank(sys.argv[1], "pipeline.training.sequence:train_all")
