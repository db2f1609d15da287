"""Which steps are looked at closely."""

from pydantic import model_validator

from models.schema import Config, Count

MOST_STEPS = 100  # every operation of every step is kept in memory until the last is written


class ProfilingConfig(Config):
    """A trace of every operation and of what ranks exchange; it slows the traced steps down."""

    steps: tuple[Count, Count] | None = None
    """First and last step to trace, as the log counts them; two or three are enough, 100 the most. None: off."""

    @model_validator(mode="after")
    def _in_order(self) -> "ProfilingConfig":
        if self.steps and self.steps[0] > self.steps[1]:
            raise ValueError(f"steps is [first, last], and {self.steps[0]} is after {self.steps[1]}")
        if self.steps and self.steps[1] - self.steps[0] >= MOST_STEPS:
            raise ValueError(f"steps [{self.steps[0]}, {self.steps[1]}] are more than {MOST_STEPS}; trace two or three")
        return self
