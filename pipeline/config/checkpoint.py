"""When the training state is saved, and what is kept."""

from pipeline.config.base import Config, Count


class CheckpointConfig(Config):
    """When the training state is saved. The last step is always saved, and a stop on request."""

    every_steps: Count = 1000
    """Steps between checkpoints."""
    keep: Count = 2
    """Newest checkpoints that stay on disk."""
