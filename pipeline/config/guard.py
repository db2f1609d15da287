"""What a training run does when its loss or its gradient goes bad."""

from models.schema import Config, Count, CountOrZero, NonNegative


class GuardConfig(Config):
    """A bad step has a loss or a gradient that is not finite, and leaves the weights alone; or its loss leaps."""

    max_skipped: Count = 5
    """Bad steps in a row before the run goes back to the last checkpoint before them, without their samples."""
    max_roll_backs: CountOrZero = 2
    """Times that a run may do so; instead of one more it stops."""
    spike_threshold: NonNegative = 0.0
    """A loss this many median absolute deviations above the median of recent steps counts as bad too. 0 is off."""
