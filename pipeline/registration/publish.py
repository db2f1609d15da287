"""Registration: a trained checkpoint becomes a version in MLflow that anybody can pull.

The order is what makes a killed registration harmless: files first, read back and held to their hashes; then the
version, with all its tags at once; then the gate. A registration that is begun again finds the version of the same
weights and goes on at the gate; files without a version are sent anew. Two at once may make a version each.
"""

import contextlib
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.stages import RegisterConfig, read_run_config
from pipeline.errors import FaultError, InputError
from pipeline.forecast.grading import FORECAST, OUTCOME
from pipeline.rank import Rank
from pipeline.registration.card import Facts, model_card
from pipeline.registration.evidence import GATE, Evidence, deciding, evidence_for, read_evidence, write_evidence
from pipeline.registration.promotion import DECISION, Promotion
from pipeline.registration.training_facts import forecast_facts, training_facts
from pipeline.registration.upload import patiently, send_verified, upload_model, use_settings
from pipeline.registry.export import export_timm_directory
from pipeline.registry.gate import Standing
from pipeline.registry.integrity import sha256_of
from pipeline.registry.locate import ModelSource, source_from_dict
from pipeline.registry.store_file import share_store
from pipeline.registry.test_reads import TAG as TEST_READS
from pipeline.registry.test_reads import merged_reads
from pipeline.registry.tracking import experiment_id, with_key
from pipeline.registry.versions import every, require_tracking_server, versions_named, whole_directory
from pipeline.registry.weights import load_model
from pipeline.run_directory import RunDirectory, read_json, write_json

log = logging.getLogger(__name__)


class Request(NamedTuple):
    """What is registered, and under which name."""

    config: RegisterConfig
    source: ModelSource
    evidence: Evidence
    facts: Facts
    home: Path


def register(me: Rank) -> None:
    """Export the model, log it in MLflow, register a version, and let the gate decide about `champion`."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    use_settings()
    config, plan = read_run_config(me.run.path), me.run.plan()
    source = source_from_dict(plan["source"])
    me.phase = "export"
    evidence = evidence_for(source.lineage, config.evaluations)
    training = training_facts(source)
    licence = config.licence or next(
        (one["licence"] for one in (training or {}).get("data", ()) if "licence" in one), None
    )
    facts = Facts(
        evidence.metrics,
        evidence.intervals,
        evidence.scored,
        evidence.test_reads,
        training,
        licence,
        uri=f"models:/{config.name}/VERSION",
        forecast=forecast_facts(source, evidence.metrics, evidence.scored),
    )
    request = Request(config, source, evidence, facts, Path(plan["home"]))
    model = load_model(source)
    width = model.num_classes or model.num_features  # scores, or pooled features
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "hf"
        sums = export_timm_directory(model, source, directory, evidence.metrics, model_card(source, facts))
        del model
        me.phase = "register"
        with _faults_of_the_registry(config.tracking_uri):
            summary = _publish(request, directory, sums, width, Path(scratch))
    write_json(me.run.result_file, {"format_version": 1, "stage": "register"} | summary)


@contextlib.contextmanager
def _faults_of_the_registry(tracking_uri: str) -> Iterator[None]:
    """A registry that has gone away is a fault of the machinery, whatever MLflow calls it."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        try:
            require_tracking_server(tracking_uri)
        except InputError as gone:
            raise FaultError(f"{gone}; what was registered by then stays, run it again") from error
        raise


def _publish(request: Request, directory: Path, sums: str, width: int, scratch: Path) -> dict[str, Any]:
    import mlflow

    config = request.config
    share_store(config.tracking_uri)
    mlflow.set_tracking_uri(config.tracking_uri)
    client = mlflow.MlflowClient()
    weights = sha256_of(directory / "model.safetensors")
    folder = scratch / GATE
    evidence_sha256 = write_evidence(request.evidence, folder / "new")
    (folder / "new").rename(folder / evidence_sha256[:16])
    tags = _tags(request, weights, sums, evidence_sha256)
    version, again = _version_of(client, request, weights), True
    if version is None:
        again = False
        run_id = _run_of(client, request)
        metrics = request.evidence.metrics
        uploaded = upload_model(client, run_id, directory, width, metrics, scratch, folder)
        version = _new_version(client, config.name, uploaded, run_id, tags)
        client.set_terminated(run_id, "FINISHED")
    elif version.tags.get("vit.gate_evidence_sha256") == evidence_sha256 and DECISION in version.tags:
        return _nothing_new(client, config, version)
    else:
        _renew(client, request, version, tags, folder, scratch)
    _describe(client, request, version)
    return _promoted(client, request, str(version.version), again, scratch)


def _tags(request: Request, weights: str, sums: str, evidence_sha256: str) -> dict[str, str]:
    """Everything that is known of a version when it is made; `explain` and the next gate read it."""
    source, evidence = request.source, request.evidence
    tags = {f"vit.{key}": str(value) for key, value in source.lineage.items() if value is not None}
    tags |= {
        "vit.model_sha256": weights,
        "vit.artifact_sha256": sums,
        "vit.gate_evidence_sha256": evidence_sha256,
        TEST_READS: merged_reads({}, evidence.test_reads),
    }
    if first := next(iter(deciding(evidence.standings)), None):
        tags |= {"vit.gate_metric": first.metric, "vit.gate_value": repr(first.value), "vit.gate_data": first.data,
                 "vit.gate_split": first.split}  # fmt: skip
    for name, one in request.facts.forecast.items():
        tags[f"{FORECAST}{name}"] = f"{one['value']:.6g} [{one['low']:.6g}, {one['high']:.6g}]"
        if "outcome" in one:
            tags[f"{OUTCOME}{name}"] = f"{one['outcome']:.6g}"
    if request.facts.licence:
        tags["vit.licence"] = request.facts.licence
    if commit := _git_commit(source):
        tags["vit.git_commit"] = commit
    return tags


def _git_commit(source: ModelSource) -> str | None:
    if "run" not in source.lineage:
        return None
    return (read_json(RunDirectory(source.lineage["run"]).provenance_file) or {}).get("code", {}).get("commit")


def _run_of(client: Any, request: Request) -> str:
    """The MLflow run of the training that made this checkpoint, or a new one where it left none here."""
    config, trained = request.config, request.source.lineage.get("run")
    if trained:
        key = RunDirectory(trained).key
        ids = [experiment.experiment_id for experiment in every(client.search_experiments)]
        found = client.search_runs(ids, with_key(key), max_results=1) if ids else []
        if found:
            return found[0].info.run_id
    experiment = experiment_id(client, "vit/register", config.tracking_uri, request.home)
    return client.create_run(experiment, run_name=config.name).info.run_id


def _version_of(client: Any, request: Request, weights: str) -> Any:
    """The version of this name that has this checkpoint's weights and is whole in the store; None where none is."""
    name, lineage = request.config.name, request.source.lineage
    step = None if lineage.get("step") is None else str(lineage["step"])
    for version in versions_named(client, name):
        same = (version.tags.get("vit.model_sha256"), version.tags.get("vit.run"), version.tags.get("vit.step"))
        if same != (weights, lineage.get("run"), step):
            continue
        uri = f"models:/{name}/{version.version}"
        try:
            whole_directory(client, version, request.home)
            return version
        except InputError as error:
            log.warning("%s has these weights, but is not whole; a new version is made: %s", uri, error)
    return None


def _new_version(client: Any, name: str, uploaded: Any, run_id: str, tags: dict[str, str]) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # Not tried again here: an answer that was lost may stand for a version that was made.
    return client.create_model_version(name, uploaded.uri, run_id, tags=tags, model_id=uploaded.model_id)


def _nothing_new(client: Any, config: RegisterConfig, version: Any) -> dict[str, Any]:
    number = str(version.version)
    aliases = client.get_registered_model(config.name).aliases
    named = sorted(alias for alias, of in aliases.items() if str(of) == number)
    also = f" ({', '.join(named)})" if named else ""
    words = f"models:/{config.name}/{number} already is this checkpoint with these weights and these evaluations{also}"
    return _summary(config, number, "champion" in named, version.tags[DECISION], None) | {
        "registered": False,
        "moved": False,
        "summary": f"{words}; nothing was uploaded",
    }


def _renew(client: Any, request: Request, version: Any, tags: dict[str, str], folder: Path, scratch: Path) -> None:
    """Give a version that is there what newer evaluations say of it; what its tags say of its files stays."""
    newer = ("vit.gate_", FORECAST, OUTCOME)
    tags = {key: value for key, value in tags.items() if key.startswith(newer) or key == "vit.licence"}
    tags[TEST_READS] = merged_reads(version.tags, request.evidence.test_reads)
    model = client.get_logged_model(_model_id(version))
    parent = scratch / "renewed"
    parent.mkdir()
    folder.rename(parent / GATE)
    try:
        send_verified(client, model, parent, scratch)
    except FaultError as error:
        raise FaultError(f"{error}; models:/{version.name}/{version.version} stays as it was") from error
    for key, value in request.evidence.metrics.items():
        if version.run_id:
            client.log_metric(version.run_id, key, value, model_id=model.model_id)
    for key, value in tags.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(version.name, version.version, key, value)


def _model_id(version: Any) -> str:
    """Of the logged model that a version is made of: MLflow keeps it in the source alone."""
    return version.source.removeprefix("models:/")


def _describe(client: Any, request: Request, version: Any) -> None:
    """The model card, where MLflow's pages show it."""
    facts = request.facts._replace(uri=f"models:/{request.config.name}/{version.version}")
    card = model_card(request.source, facts)
    patiently("the description", lambda: client.update_model_version(version.name, version.version, card))
    client.set_logged_model_tags(_model_id(version), {"mlflow.note.content": card})


def _promoted(client: Any, request: Request, number: str, again: bool, scratch: Path) -> dict[str, Any]:
    config = request.config
    found: dict[str, list[Standing] | str] = {}

    def standings_of(number: str) -> list[Standing] | str:
        if number not in found:
            found[number] = version_standings(client.get_model_version(config.name, number), scratch)
        return found[number]

    promotion = Promotion(client, config.name, number, standings_of, config.promotion_margin)
    verdict, before = promotion.decide()
    alias = "champion" if verdict.promoted else "candidate"
    previous = f"models:/{config.name}/{before}" if before is not None else None
    words = f"models:/{config.name}/{number} is {alias}: {verdict.reason}"
    if again:
        words = f"models:/{config.name}/{number} already is this checkpoint with these weights; compared again: {words}"
    return _summary(config, number, verdict.promoted, verdict.reason, previous) | {
        "registered": not again,
        "moved": verdict.promoted and before != number,
        "summary": words,
    }


def version_standings(version: Any, scratch: Path) -> list[Standing] | str:
    """What a version brings to the gate, from its own artifacts; in words why it cannot be told."""
    tags = version.tags
    if expected := tags.get("vit.gate_evidence_sha256"):
        try:
            return read_evidence(_evidence_folder(version, expected, scratch), expected)
        except InputError as error:
            return f"what version {version.version} was evaluated as cannot be read: {error}"
    if tags.get("vit.gate_metric") and tags.get("vit.gate_data"):  # registered before versions had evidence
        return [Standing(tags["vit.gate_metric"], float(tags["vit.gate_value"]), tags["vit.gate_data"], "test")]
    return []


def _evidence_folder(version: Any, expected: str, scratch: Path) -> Path:
    import mlflow
    from mlflow.exceptions import MlflowException

    uri = f"models:/{version.name}/{version.version}/{GATE}/{expected[:16]}"
    try:
        return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(scratch)))
    except (MlflowException, OSError) as error:
        raise InputError(f"{uri}: {str(error).splitlines()[0]}") from None


def _summary(config: RegisterConfig, number: str, promoted: bool, reason: str, previous: str | None) -> dict[str, Any]:
    return {
        "uri": f"models:/{config.name}/{number}",
        "tracking_uri": config.tracking_uri,
        "name": config.name,
        "version": int(number),
        "promoted": promoted,
        "previous": previous,
        "reason": reason,
    }
