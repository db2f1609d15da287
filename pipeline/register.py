"""Registration of a model in MLflow: `python -m pipeline.register RUN_DIR`, one process."""

import sys

from pipeline.rank import run_rank

if __name__ == "__main__":
    run_rank(sys.argv[1], "pipeline.registration.publish:register", stops_at_steps=False)
