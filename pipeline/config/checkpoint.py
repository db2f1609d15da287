"""When the training state is saved, what is kept, and where it is copied to."""

from pydantic import field_validator

from models.schema import Config, Count, CountOrZero, Positive
from pipeline.errors import InputError
from pipeline.storage.location import location

MIRROR_SCHEMES = ("s3", "s3a", "gs", "gcs", "file")  # what checkpoints are written to


class CheckpointConfig(Config):
    """When the training state is saved. The last step is always saved, and a stop on request."""

    every_steps: Count | None = None
    """Steps between checkpoints. None: as often as pays, from the measured time of saving and
    `hours_between_failures`; the first after two minutes, and never more than half an hour apart."""
    hours_between_failures: Positive = 6300.0
    """Mean time between failures of one node, in hours; of a job it is that over its nodes. The default is the rate of
    Llama 3's 54 days on 16,384 GPUs, 3.8 per 1,000 days of a node. Lower it where jobs are preempted."""
    keep: Count = 2
    """Newest checkpoints that stay on disk; beside them the best, and the last before a constant rate cools down."""
    keep_every_steps: CountOrZero = 0
    """The state after every so many steps is saved and stays for ever. 0 is off."""
    weights_every_steps: CountOrZero = 0
    """After every so many steps the weights alone, the moving average where there is one, are written to
    RUN/weights/step-N/model.safetensors, beside a checkpoint. 0 is off."""

    mirror: str | None = None
    """A URL (s3://, gs:// or file://) under which committed checkpoints are copied, as URL/<name of the run>/step-N. A
    run directory without checkpoints goes on from the newest one there. None: no copies."""

    @field_validator("mirror")
    @classmethod
    def _can_be_written(cls, url: str | None) -> str | None:
        if url is None:
            return None
        try:
            location(url)
        except InputError as error:  # it carries a password
            raise ValueError(str(error)) from None
        scheme, _, rest = url.partition("://")
        if scheme not in MIRROR_SCHEMES or not rest.strip("/"):
            known = ", ".join(f"{scheme}://" for scheme in MIRROR_SCHEMES)
            raise ValueError(f"expected a URL that begins with one of {known} (got {url!r})")
        return url

    def interval_in_words(self, nodes: int) -> str:
        """When checkpoints are made, for people."""
        if self.every_steps is not None:
            return f"every {self.every_steps:,} steps"
        return (
            f"as often as pays where a failure is to be expected every {self.hours_between_failures / nodes:,.0f} "
            "hours: the first after 2 minutes, then at most 30 minutes apart"
        )
