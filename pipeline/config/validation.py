"""When a model in training is scored on images that it does not learn from, and what decides which state was best."""

from typing import Literal

from models.schema import Config, CountOrZero

SPLIT = "validation"
DIRECTIONS: dict[str, Literal["min", "max"]] = {"loss": "min", "accuracy": "max"}


class ValidationConfig(Config):
    """Scores on the split `validation`, of the averaged weights where `ema_decay` is on. Changes no weight."""

    every_steps: CountOrZero | None = None
    """Steps between scores; the last step is scored too, and every state that was scored is saved. 0 is off.
    None: once an epoch, at most a hundred times in the run, and off where the dataset has no such split or the run is
    shorter than an epoch."""
    best: Literal["loss", "accuracy"] | None = None
    """What decides which checkpoint is the best: the lowest loss or the highest accuracy. None: accuracy of a
    supervised objective, loss of any other."""

    @property
    def best_metric(self) -> tuple[str, Literal["min", "max"]] | None:
        """The name in the ledger of what decides, and which of two is better; None where nothing is scored."""
        if not self.every_steps or self.best is None:
            return None
        return f"{SPLIT}/{self.best}", DIRECTIONS[self.best]
