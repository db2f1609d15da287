"""`python -m pipeline.import_checkpoint SOURCE RUN`: bring a state of DeepSpeed's or accelerate's into a prepared run.

RUN is what `vit pretrain ... --dry-run` wrote; `vit resume RUN` goes on from the imported step.
"""

import sys
from pathlib import Path

from pipeline.errors import EXIT_DONE, EXIT_FAULT, EXIT_INPUT, FaultError, InputError
from pipeline.run_directory import RunDirectory


def main(source: str, run_directory: str) -> int:
    from pipeline.checkpoints.importing import import_state
    from pipeline.config.stages import read_run_config
    from pipeline.training.loop import initial_module

    try:
        run = RunDirectory(run_directory).require()
        if run.committed_checkpoints():
            raise InputError(f"{run.path}: has checkpoints of its own; prepare a fresh run with --dry-run")
        config, plan = read_run_config(run.path), run.plan()
        checkpoint = import_state(Path(source), run, config, plan, initial_module(config, plan, resumes=True))
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_INPUT
    except FaultError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAULT
    sys.stdout.write(
        f"imported step {checkpoint.step} into {checkpoint.directory}; go on with: vit resume {run.path}\n"
    )
    return EXIT_DONE


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.stderr.write(f"{__doc__}\n")
        sys.exit(EXIT_INPUT)
    sys.exit(main(sys.argv[1], sys.argv[2]))
