"""Features of every image of a dataset, shard by shard; ranks share the shards and need not meet until the end."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config.embed import EmbedConfig
from pipeline.config.plan import BatchPlan
from pipeline.config.stages import read_run_config
from pipeline.embedding.store import begin_store, missing_shards, nearest, write_shard
from pipeline.errors import DataError, InputError
from pipeline.evaluation.feature_cache import weights_hash
from pipeline.evaluation.features import TOLD_EVERY_SECONDS, evaluation_input_of, pooled_features
from pipeline.evaluation.job import meet_patiently, tell_terminal
from pipeline.evaluation.single_images import file_samples, normalised_views
from pipeline.loading.evaluation_stream import EvaluationStream
from pipeline.loading.left_out import all_but_left_out, num_scored
from pipeline.loading.loader import Loader, to_device
from pipeline.loading.stream import Damaged
from pipeline.rank import Rank
from pipeline.registry.locate import ModelSource, source_from_dict
from pipeline.registry.weights import load_model
from pipeline.run_directory import write_json
from pipeline.shards.index import DatasetIndex, read_index
from pipeline.shards.reader import ShardReader

log = logging.getLogger(__name__)


def embed(me: Rank) -> None:
    """Make the files that are missing, and look the queries up; rank 0 writes `result.json`. Collective at its end."""
    tell_terminal(me)
    config, plan = read_run_config(me.run.path), me.run.plan()
    source, index = source_from_dict(plan["source"]), read_index(config.data)
    queries = _queries(source, config)  # what is no image is said before anything is embedded
    meet_patiently(me)
    me.phase = "embed"
    device = torch.device("cuda", me.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    model, folder = load_model(source).to(device), Path(config.destination)
    if me.is_first:
        begin_store(folder, _facts(model, source, index, config))
    if me.world_size > 1:
        dist.barrier()
    splits = [split for split in config.splits if split in index.splits]
    before = missing_shards(folder, index, splits)
    if me.world_size > 1:
        dist.barrier()  # all have looked before the first writes
    made = torch.tensor(0)
    for split, shards in before.items():
        made += _embed_shards(model, source, index, split, shards[me.rank :: me.world_size], config, plan, device)
    if me.world_size > 1:
        dist.all_reduce(made)
    if me.is_first:
        result = {
            "format_version": 1, "stage": "embed", "destination": str(folder), "dimensions": model.num_features,
            "images": sum(num_scored(index, split) for split in splits), "made": int(made),
            "nearest": _answers(model, queries, config, device),
        }  # fmt: skip
        write_json(me.run.result_file, result)


def _facts(model: nn.Module, source: ModelSource, index: DatasetIndex, config: EmbedConfig) -> dict:
    """What tells the embeddings of one folder from others."""
    return {
        "format_version": 1, "model": source.reference, "weights": weights_hash(model),
        "pooling": "mean of the patch tokens after the last norm, or what another network's head reads",
        "precision": config.precision, "data_fingerprint": index.remaining_fingerprint,
        "shards": [shard.sha256 for split in config.splits if split in index.splits for shard in index.shards(split)],
    }  # fmt: skip


class _Excerpt:
    """Some shards of a split as a stream of their own: position p is the p-th sample of them; then padding."""

    def __init__(self, stream: EvaluationStream, shards: list[int], batch_size: int):
        self.stream = stream
        sizes = np.diff(stream.starts)
        self.places = np.concatenate([np.arange(stream.starts[s], stream.starts[s] + sizes[s]) for s in shards])
        self.image_shape, self.dtype = stream.image_shape, stream.dtype
        self.batches = -(-len(self.places) // batch_size)

    def fill(self, positions: np.ndarray, images: np.ndarray, labels: np.ndarray) -> tuple[list[str], list[Damaged]]:
        places = self.places[np.minimum(positions, len(self.places) - 1)]
        return self.stream.fill(places, images, labels)

    def stager(self, *arguments, **options):
        return self.stream.stager(*arguments, **options)


@torch.inference_mode()
def _embed_shards(
    model: nn.Module, source: ModelSource, index: DatasetIndex, split: str, shards: list[int], config: EmbedConfig,
    plan: dict, device: torch.device,
) -> int:  # fmt: skip
    """How many images were embedded."""
    folder, tars = Path(config.destination), index.shards(split)
    sizes = all_but_left_out(ShardReader(index, split)).shard_sizes[shards]
    for number in np.array(shards)[sizes == 0].tolist():  # all of it was taken down
        write_shard(folder, tars[number].name, split, [], np.empty(0, np.int64), (), np.empty((0, model.num_features)))
    shards = np.array(shards, int)[sizes > 0].tolist()
    if not shards:
        return 0
    stream = EvaluationStream([index], split, config.batch_size, evaluation_input_of(source), index.classes)
    excerpt = _Excerpt(stream, shards, config.batch_size)
    batches = BatchPlan(config.batch_size, config.batch_size, 1, 1)
    rows = _rows(model, source, excerpt, batches, config, plan["loader_workers"], device)
    for number in shards:
        size = int(stream.starts[number + 1] - stream.starts[number])
        keys, labels, features = zip(*(next(rows) for _ in range(size)), strict=True)
        write_shard(folder, tars[number].name, split, keys, np.array(labels), index.classes or (), np.stack(features))
    return int(sizes.sum())


def _rows(
    model, source, excerpt: _Excerpt, batches: BatchPlan, config: EmbedConfig, workers: int, device
) -> Iterator[tuple[str, int, np.ndarray]]:
    """(key, label, features) of one sample after the other."""
    told, count = time.monotonic(), 0
    with Loader(excerpt, batches, rank=0, first_step=0, last_step=excerpt.batches, workers=workers) as loader:
        for raw in loader:
            batch = to_device(raw, device, source.mean, source.std, torch.float32)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                features, _ = pooled_features(model, batch.images)
            real = min(len(raw.keys), len(excerpt.places) - count)
            count += real
            yield from zip(
                raw.keys[:real], raw.labels[:real].tolist(), features[:real].float().cpu().numpy(), strict=True
            )
            if time.monotonic() - told > TOLD_EVERY_SECONDS:
                told = time.monotonic()
                log.info("%d of %d images", count, len(excerpt.places))


def _queries(source: ModelSource, config: EmbedConfig) -> Tensor | None:
    """(Q, C, H, W) float32, None without queries. InputError names the file that is no image."""
    if not config.query:
        return None
    samples = file_samples(config.query, evaluation_input_of(source).channels, named="--query")
    try:
        return normalised_views(samples, source)
    except DataError as error:
        raise InputError(f"--query: {error}") from None


@torch.inference_mode()
def _answers(
    model: nn.Module, queries: Tensor | None, config: EmbedConfig, device: torch.device
) -> dict[str, list[dict]]:
    """For each query its nearest images."""
    if queries is None:
        return {}
    features, _ = pooled_features(model, queries.to(device))
    found = nearest(Path(config.destination), features.float().cpu().numpy(), config.nearest)
    return {
        path: [one._asdict() for one in neighbours] for path, neighbours in zip(config.query, found, strict=True)
    }  # fmt: skip
