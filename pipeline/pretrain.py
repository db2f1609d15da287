"""One rank of a pretrain run: `python -m pipeline.pretrain RUN_DIR`, under any launcher."""

import sys

from pipeline.rank import run_rank

if __name__ == "__main__":
    run_rank(sys.argv[1], "pipeline.training.loop:train")
