"""One rank of an embedding: `python -m pipeline.embed RUN_DIR`."""

import sys

from pipeline.rank import run_rank

if __name__ == "__main__":
    run_rank(sys.argv[1], "pipeline.embedding.job:embed", stops_at_steps=False)
