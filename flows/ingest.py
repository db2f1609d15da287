"""The ingestion flow: `prefect deployment run ingest/images --param source=DIR --param dest=DIR`."""

from prefect import flow
from prefect.states import Completed, Failed, State

from flows.control.progress import ingest_progress, ingest_words
from flows.orchestration.reporting import refused, reporter
from pipeline.config.ingest import IngestConfig
from pipeline.config.recipe import apply_overrides, parse_overrides, validate
from pipeline.errors import InputError
from pipeline.ingestion.build import IngestError
from pipeline.ingestion.build import ingest as build_dataset


@flow(name="ingest")
def ingest(source: str, dest: str, set: list[str] = []) -> State:
    """Raw images to a checked dataset directory.

    Args:
        source: a folder, zips or tars, absolute; a URL of those; or sklearn:digits.
        dest: the dataset directory to make, absolute.
        set: settings of the ingestion, as key=value.
    """
    try:
        config = validate(IngestConfig, apply_overrides({}, parse_overrides(set)), "set")
        report = build_dataset(source, dest, config, progress=ingest_progress(reporter()))
    except InputError as error:
        return refused(error)
    except IngestError as error:
        return Failed(message=str(error))
    return Completed(message=ingest_words(report), data=dest)
