"""One rank of a finetune run: `python -m pipeline.finetune RUN_DIR`, under any launcher."""

import sys

from pipeline.rank import run_rank

if __name__ == "__main__":
    run_rank(sys.argv[1], "pipeline.training.loop:train")
