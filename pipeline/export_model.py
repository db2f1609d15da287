"""A model in another format, behind a gate: `python -m pipeline.export_model RUN_DIR`, one process."""

import sys

from pipeline.rank import run_rank

if __name__ == "__main__":
    run_rank(sys.argv[1], "pipeline.exporting.job:export", stops_at_steps=False)
