"""One step of a training run again: `python -m pipeline.replay RUN_DIR STEP`, under any launcher, or alone."""

import os
import sys

from pipeline.errors import EXIT_INPUT, InputError
from pipeline.ports import free_port
from pipeline.run_directory import RunDirectory


def main(run_directory: str, step: str) -> None:
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in os.environ:
        os.environ |= alone | {"MASTER_PORT": str(free_port())}
    from pipeline.training.replay import report

    report(RunDirectory(run_directory).require(), int(step))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(EXIT_INPUT)
