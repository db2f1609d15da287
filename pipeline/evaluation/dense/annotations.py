"""The masks and boxes of a split in the frame of a model's input, by the positions of the samples that are scored."""

import numpy as np

from pipeline.errors import DataError
from pipeline.loading.left_out import all_but_left_out
from pipeline.shards.annotations import decode_mask
from pipeline.shards.decoding import ImageFault
from pipeline.shards.index import DatasetIndex
from pipeline.shards.reader import node_reader
from pipeline.views.annotated import boxes_view, mask_view
from pipeline.views.evaluation import EvaluationInput


class SplitAnnotations:
    """Reads one sample's annotations at a time. DataError names a sample that has not what the index promises."""

    def __init__(self, index: DatasetIndex, split: str, inputs: EvaluationInput):
        self.reader, self.inputs = node_reader(index, split), inputs
        self.selection = all_but_left_out(self.reader)
        self.starts = np.cumsum([0, *self.selection.shard_sizes])

    def mask(self, position: int) -> np.ndarray:
        """(H, W) uint8 numbers of classes, 255 where nothing counts."""
        content = self.reader.mask(*self._place(position))
        if content is None:
            raise self._fault(position, "has no mask")
        try:
            return mask_view(decode_mask(content), self.inputs)
        except ImageFault as fault:
            raise self._fault(position, f"its mask cannot be read ({fault.detail})") from None

    def boxes(self, position: int) -> np.ndarray:
        """(M, 5) float64: left, top, right, bottom in pixels of the input, class. Those whose centre is cut off are
        left out."""
        record = self.reader.record(*self._place(position))
        if "boxes" not in record:
            raise self._fault(position, "has no boxes")
        boxes = np.array(record["boxes"], np.float64).reshape(-1, 5)
        cut, inside = boxes_view(boxes[:, :4], (record["height"], record["width"]), self.inputs)
        return np.concatenate([cut, boxes[:, 4:]], axis=1)[inside]

    def _place(self, position: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.starts, position, side="right")) - 1
        return shard, self.selection.sample(shard, position - int(self.starts[shard]))

    def _fault(self, position: int, what: str) -> DataError:
        shard, number = self._place(position)
        key = self.reader.keys(shard)[number]
        return DataError(f"sample `{key}`: {what}; run `vit check DATASET --full`", cause="changed", key=key)
