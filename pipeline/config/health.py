"""When the health of a model in training is measured, from what, and what is done about a bad one."""

from typing import Literal

from models.schema import Config, Count, CountOrZero, Fraction, NonNegative, Size


class HealthConfig(Config):
    """What the model makes of a fixed set of images, of the averaged weights where there are; changes no weight.

    Most of it needs no labels: how much of the hidden patches is explained, RankMe and spread of the features, entropy
    of the attention; with labels k-NN and ridge regression too. Of the split `validation`, never of `test`.
    """

    every_steps: CountOrZero | None = None
    """Steps between measurements; the last step is measured too. 0 is off. None: as often as costs at most 2 images
    looked at for 100 trained on, and at most 40 times; off where that is not once. Where `policy` is to act, never so
    rarely that it could not: `patience` measurements lie behind `settling`."""
    images: Size | None = None
    """Images looked at of each of the splits `train` and `validation`, the same ones each time. None: four for
    each dimension of the features, from 256 to 8192, where the split has as many: with fewer RankMe is bounded by their
    number."""
    policy: Literal["report", "stop", "escalate"] = "report"
    """`report`: say it. `stop`: end with a checkpoint and exit code 1 after `patience` bad measurements in a row.
    `escalate`: then tell Prefect (event `vit.health`, and the state of the flow run) and train on. k-NN below its band
    alone makes no measurement bad: masked autoencoders are not judged by it."""
    patience: Count = 3
    """Bad measurements in a row before `policy` acts."""
    settling: Fraction = 0.1
    """Share of the run before which the alarms below are silent: a network that has learned little looks collapsed."""
    least_spread: NonNegative = 0.01
    """Alarm below this feature spread: the mean over dimensions of the standard deviation of features of length 1,
    times the root of their number; 1 is isotropic, 0 one point for all images (the collapse of SimSiam,
    arXiv:2011.10566, section 4.1). 0 is off."""
    least_rank: NonNegative = 1.01
    """Alarm below this RankMe (arXiv:2210.02885, equation 1), which is 1 where all features lie on one line. 0 is
    off."""
    least_entropy: Fraction = 0.02
    """Alarm below this entropy of the attention, as a share of the logarithm of the number of tokens: every head looks
    at one token, the entropy collapse of arXiv:2303.06296. 0 is off."""
    most_entropy: Fraction = 0.99999
    """Alarm above this entropy of the attention behind half of the run and one epoch: no head looks anywhere in
    particular. 1 is off."""
    mean_is_bad: bool = True
    """Alarm at an explained variance of 0 or less behind half of the run and one epoch: the mean of all patches would
    predict as well."""
