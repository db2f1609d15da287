"""Pictures of what a model learned: `python -m pipeline.inspect_model RUN_DIR`, one process."""

import sys

from pipeline.rank import run_rank

if __name__ == "__main__":
    run_rank(sys.argv[1], "pipeline.inspection.pictures:inspect", stops_at_steps=False)
