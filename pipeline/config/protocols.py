"""The names of evaluation protocols, and what each needs of a model and a dataset. Torch-free.

A protocol fixes pooling, preprocessing, optimiser, length and selection; whatever of that changes gets another version.
Its name is in the name of its metrics: `eval/PROTOCOL/DATASET/METRIC`.

classify-v1           the model's own head: top-1, top-5, mean per class
calibration-v1        the head's confidence: ECE of 15 bins, likelihood, Brier score, and after one temperature
corruptions-v1        the head's top-1 under ten corruptions at five severities
knn-20-v1             20 nearest neighbours by cosine
linear-cached-v1      logistic regression on standardised features, its penalty chosen on held-back training samples
fewshot-lsr-v1        least squares from 1, 5, 10 and 25 images of each class, five draws
retrieval-v1          images of the same class first: mAP, recall at 1, 5 and 10
segment-linear-v1     the class of each pixel, by one linear layer on patch tokens: mean IoU
detect-linear-v1      boxes, by one linear layer on patch tokens: AP at an IoU of 0.5, and from 0.5 to 0.95
linear-mae-v1         MAE's linear probe, trained on augmented images: recipe finetune_linear_mae_v1
attentive-v1          an attentive probe on patch tokens, trained likewise: recipe finetune_attentive_v1
finetune-transfer-v1  short fine-tuning of all weights: recipe finetune_transfer_v1
vtab1k-v1             VTAB's 1,000 examples and 2,500 steps: recipe finetune_vtab1k_v1

`forgetting-v1` stands for knn-20-v1 and linear-cached-v1 of a model and of the one that it was initialised from, on the
data that this one learned from: the old protocols, before and after.

Preprocessing of all that are not trained: shorter side to image_size / evaluation_crop, centre crop, the model's own
mean and deviation. Features are the mean of the patch tokens after the last norm, in float32.
"""

from typing import Literal, NamedTuple, get_args

Protocol = Literal[
    "classify-v1", "calibration-v1", "corruptions-v1",
    "knn-20-v1", "linear-cached-v1", "fewshot-lsr-v1", "retrieval-v1",
    "segment-linear-v1", "detect-linear-v1",
    "linear-mae-v1", "attentive-v1", "finetune-transfer-v1", "vtab1k-v1",
]  # fmt: skip


class Needs(NamedTuple):
    """What a protocol asks for. A `recipe` is trained on the dataset first, and its own head is scored."""

    head: bool = False  # of the model's own, for the dataset's classes
    features: bool = False  # of the train split too
    masks: bool = False  # of the dataset, in train too; and patch tokens, which plain ViTs have
    boxes: bool = False  # likewise
    recipe: str | None = None

    @property
    def dense(self) -> bool:
        """Whether it learns from masks or boxes instead of labels."""
        return self.masks or self.boxes


NEEDS: dict[str, Needs] = {
    "classify-v1": Needs(head=True),
    "calibration-v1": Needs(head=True),
    "corruptions-v1": Needs(head=True),
    "knn-20-v1": Needs(features=True),
    "linear-cached-v1": Needs(features=True),
    "fewshot-lsr-v1": Needs(features=True),
    "retrieval-v1": Needs(features=True),
    "segment-linear-v1": Needs(masks=True),
    "detect-linear-v1": Needs(boxes=True),
    "linear-mae-v1": Needs(recipe="finetune_linear_mae_v1"),
    "attentive-v1": Needs(recipe="finetune_attentive_v1"),
    "finetune-transfer-v1": Needs(recipe="finetune_transfer_v1"),
    "vtab1k-v1": Needs(recipe="finetune_vtab1k_v1"),
}
PROTOCOLS: tuple[str, ...] = get_args(Protocol)
FORGETTING = "forgetting-v1"  # of a model that was pretrained further: these, of its parent too, on the parent's data
OF_FORGETTING = ("knn-20-v1", "linear-cached-v1")
BY_DEFAULT = ("classify-v1", "knn-20-v1", "linear-cached-v1")
assert set(NEEDS) == set(PROTOCOLS)
