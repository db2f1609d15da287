"""What becomes of archives: zips are read in place; tars are adopted, rewritten, or read as archives of folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import InputError
from pipeline.ingestion.archives.members import TarFault
from pipeline.ingestion.archives.naming import count_up, is_compressed, is_zip
from pipeline.ingestion.archives.rewriting import SampleSource
from pipeline.ingestion.archives.source import ArchiveSource, archives_at
from pipeline.ingestion.archives.tars import TarSurvey, label_rule, looks_like_samples, split_of_tar, survey_tar
from pipeline.ingestion.archives.unpacking import Scratch
from pipeline.shards.parallel import POOL_FROM_BYTES, available_cores, in_processes
from pipeline.storage.location import Location, size_of


@dataclass(frozen=True)
class AdoptedTars:
    """Tars that stay where they are; not a source, for nothing is written from them but tables."""

    tars: tuple[Location, ...]


def open_archives(
    source: str, archives: Sequence[Location], tars: str | None, scratch: Scratch, workers: int | None
) -> ArchiveSource | AdoptedTars:
    """The source of these archives, of one kind. `tars` is the config's: adopt, rewrite, archive, or None to look."""
    if is_zip(archives[0]):
        if tars is not None:
            raise InputError(f"{source}: tars: {tars}: a zip is read in place; leave `tars` out")
        return ArchiveSource(archives_at(archives))
    packed = [tar for tar in archives if is_compressed(tar)]
    if packed and tars == "adopt":
        raise InputError(
            f"{packed[0]}: tars: adopt: a compressed tar has no offsets to read at; decompress it, or say tars=rewrite"
        )
    plain = [scratch.unpack(tar) if is_compressed(tar) else tar for tar in archives]
    tars = tars or _decided(source, archives, plain)
    match tars:
        case "adopt":
            if any(str(tar).startswith("memory://") for tar in archives):
                raise InputError(f"{source}: what memory:// holds ends with this process; say --set tars=rewrite")
            return AdoptedTars(tuple(archives))
        case "rewrite":
            rule = label_rule(survey_tars(plain, workers))
            return SampleSource(archives_at(archives, plain), rule=rule)
        case _:
            return ArchiveSource(archives_at(archives, plain))


def survey_tars(tars: Sequence[Location], workers: int | None) -> list[TarSurvey]:
    """What the tars say of their samples, in the order of the tars."""
    cores = workers or available_cores()
    pool = len(tars) > 1 and sum(map(size_of, tars)) >= POOL_FROM_BYTES
    surveys = {survey.tar: survey for survey in in_processes(survey_tar, tars, cores if pool else 1)}
    return [surveys[tar] for tar in tars]


def _decided(source: str, archives: Sequence[Location], plain: Sequence[Location]) -> str:
    """As the first tar says: folders without labels beside the images are an archive, anything else is WebDataset's."""
    try:
        samples = looks_like_samples(plain[0])
    except TarFault as fault:
        raise InputError(str(fault)) from None
    splits = all(split_of_tar(Path(archive.name)) for archive in archives)
    if samples is None and len(archives) > 1 and not (splits or count_up(archives)):
        raise InputError(
            f"{source}: tars: is each tar a class, or a shard of images without labels? They hold images alone. Say "
            "--set tars=archive for classes, tars=adopt for shards"
        )
    if samples is False:
        return "archive"
    return "rewrite" if any(map(is_compressed, archives)) else "adopt"
