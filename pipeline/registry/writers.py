"""Optional views of a run's ledger beside MLflow: TensorBoard's event files, and Weights & Biases.

Fed by whoever watches the run, never by the trainer, and from a cursor each: nothing is lost or written twice.
"""

import importlib.util
import logging
from typing import Any, Protocol

from pipeline.config.recipe import read_yaml
from pipeline.errors import InputError
from pipeline.registry.ledger_cursor import LedgerCursor, metrics_of
from pipeline.run_directory import RunDirectory

log = logging.getLogger(__name__)


class Writer(Protocol):
    """Shows the ledger somewhere."""

    def forward(self) -> None:
        """Show what the ledgers hold beyond the cursor."""

    def finish(self) -> None:
        """Show the rest, and close."""


class TensorBoardWriter:
    """Event files in RUN/tensorboard: `tensorboard --logdir HOME/runs` shows all runs."""

    def __init__(self, run: RunDirectory):
        self.cursor, self.directory = LedgerCursor(run, "tensorboard.json"), run.path / "tensorboard"
        self._writer: Any = None

    def forward(self) -> None:
        for lines in self.cursor.fresh():
            if self._writer is None:
                from tensorboard.summary import Writer as EventWriter

                self._writer = EventWriter(str(self.directory))
            for line in lines:
                for name, value in metrics_of(line).items():
                    self._writer.add_scalar(name, value, line["step"], wall_time=line["time"])
            self._writer.flush()

    def finish(self) -> None:
        self.forward()
        if self._writer is not None:
            self._writer.close()


class WandbWriter:
    """A Weights & Biases run named after the run directory; WANDB_MODE=offline keeps it in RUN/wandb."""

    def __init__(self, run: RunDirectory):
        self.run, self.cursor, self._wandb_run = run, LedgerCursor(run, "wandb.json"), None

    def forward(self) -> None:
        for lines in self.cursor.fresh():
            if self._wandb_run is None:
                import wandb

                self._wandb_run = wandb.init(
                    project="vit", id=self.run.key, name=self.run.path.name, dir=str(self.run.path), resume="allow",
                    settings=wandb.Settings(silent=True, console="off"),
                )  # fmt: skip
            for line in lines:
                self._wandb_run.log(metrics_of(line), step=line["step"])

    def finish(self) -> None:
        self.forward()
        if self._wandb_run is not None:
            self._wandb_run.finish()


WRITERS: dict[str, type] = {"tensorboard": TensorBoardWriter, "wandb": WandbWriter}


def require_packages(names: tuple[str, ...]) -> None:
    """InputError where a writer's package is missing."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise InputError(
            *(f"writers: {name} is not installed; install it with `uv sync --extra {name}`" for name in missing)
        )


def writers_of(run: RunDirectory) -> list[Writer]:
    """The writers that the run's config names."""
    return [WRITERS[name](run) for name in read_yaml(run.config_file).get("writers", ())]
