"""The datasets and models that a person named, or that there are where nothing was named."""

from collections.abc import Sequence
from pathlib import Path

from flows.home import read_stack, tracking_uri
from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion.build import ingest
from pipeline.loading.sources import Sources
from pipeline.registry.locate import ModelSource, locate_model
from pipeline.registry.timm_facts import described_by_timm
from pipeline.shards.index import DatasetIndex, read_index
from pipeline.storage.location import is_url

Data = str | Sequence[str] | None  # PATH, or several PATH=WEIGHT


def dataset(path: str | None, home: Path) -> DatasetIndex | None:
    """The dataset at `path`, or the one `vit up --data` was given; None where neither is said."""
    path = path or (read_stack(home) or {}).get("data")
    if not path:
        return None
    return read_index(path if is_url(path) else Path(path).expanduser().absolute(), check_sizes=True)


def named_destination(path: str) -> str:
    """The absolute path of DEST; InputError where it is empty, which would be the current directory."""
    if not path.strip():
        raise InputError("DEST is empty; name a folder")
    return str(Path(path).expanduser().absolute())


def training_sources(data: Data, home: Path) -> Sources | None:
    """The datasets to train on, each `PATH` or `PATH=WEIGHT`; by default the one `vit up --data` was given, else None.

    Weights are given to all datasets or to none.
    """
    data = [data] if isinstance(data, str) else data
    if not data:
        index = dataset(None, home)
        return None if index is None else Sources((index,))
    split = [_path_and_weight(one) for one in data]
    without = [path for path, weight in split if weight is None]
    if len(without) not in (0, len(split)):
        raise InputError(f"--data {without[0]}: it has no weight and others do; write --data {without[0]}=WEIGHT")
    indexes = tuple(dataset(path, home) for path, _ in split)
    return Sources(indexes, None if without else tuple(weight for _, weight in split))


def _path_and_weight(data: str) -> tuple[str, float | None]:
    path, equals, weight = data.rpartition("=")
    if not equals or Path(data).expanduser().exists():
        return data, None
    try:
        number = float(weight)
    except ValueError:
        if Path(path).expanduser().exists():
            raise InputError(f"--data {data}: the weight `{weight}` is not a number; write --data {path}=2.5") from None
        return data, None
    if not 0 < number < float("inf"):
        raise InputError(f"--data {data}: the weight {weight} is not above 0; leave the dataset out, or raise it")
    return path, number


def built_in_dataset(home: Path) -> DatasetIndex:
    """Real images that come with scikit-learn, ingested once under the home: what a rehearsal without data reads."""
    destination = home / "data" / "digits"
    if not (destination / "index.json").is_file():
        ingest("sklearn:digits", destination, IngestConfig())
    return read_index(destination, check_sizes=True)


def named_model(reference: str | None, home: Path) -> ModelSource | None:
    """The located MODEL; None where none is named."""
    return None if reference is None else locate_model(reference, tracking_uri=tracking_uri(home), home=home)


def described_model(reference: str, home: Path, *, instead: str) -> ModelSource:
    """The located MODEL; InputError, ending in what to do `instead`, where it does not say what network it is and how
    its images were normalised."""
    source = described_by_timm(locate_model(reference, tracking_uri=tracking_uri(home), home=home))
    if source.encoder is None:
        raise InputError(f"MODEL `{reference}`: weights alone do not say which encoder they fit; {instead}")
    if source.mean is None or source.std is None:
        raise InputError(f"MODEL `{reference}`: it does not say how its images were normalised; {instead}")
    return source
