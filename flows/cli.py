"""`vit`: the command line. Recipe plus `--set`, and no third way; the flows call the same functions.

Heavy imports stay inside the commands, so that help answers at once.
"""

import json
import os
import sys
from importlib.metadata import version
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from flows.credentials import without_passwords_in_urls
from pipeline.errors import EXIT_FAILED, EXIT_FAULT, EXIT_INPUT, FaultError, InputError
from pipeline.redaction import without_secrets

EXIT_PIPE = 141  # 128 + SIGPIPE, as shells have it

app = App(
    name="vit",
    version=lambda: version("vit-pretraining"),
    help="Distributed ViT pretraining: raw images in, a registered and evaluated model out.",
    help_format="plaintext",
)
Protocols = Annotated[list[str], Parameter(negative=(), consume_multiple=False)]
Queries = Annotated[list[str], Parameter(name="--query", negative=(), consume_multiple=False)]
Set = Annotated[list[str], Parameter(name="--set", negative=(), consume_multiple=False)]
FinetuneSet = Annotated[list[str], Parameter(name="--finetune-set", negative=(), consume_multiple=False)]
IngestSet = Annotated[list[str], Parameter(name="--ingest-set", negative=(), consume_multiple=False)]
Rehearse = Annotated[bool | None, Parameter(name="--rehearse", negative="--no-rehearse")]
Switch = Annotated[bool, Parameter(negative=())]
Dir = Annotated[str | None, Parameter(name="--dir")]
Data = Annotated[list[str], Parameter(name="--data", negative=(), consume_multiple=False)]


def main() -> None:
    """Run a command and exit with the code of the contract; wrong input is one line per problem, never a traceback."""
    try:
        without_passwords_in_urls()
        code = app(result_action="return_value", exit_on_error=False, print_error=False)
    except CycloptsError as error:
        say(f"vit: {error}; see `vit --help`", error=True)
        sys.exit(EXIT_INPUT)
    except InputError as error:
        for problem in error.problems:
            say(problem, error=True)
        sys.exit(EXIT_INPUT)
    except FaultError as error:
        say(str(error), error=True)
        sys.exit(EXIT_FAULT)
    except BrokenPipeError:  # whoever read has enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at exit
        sys.exit(EXIT_PIPE)
    except OSError as error:
        say(f"{error.filename or 'vit'}: {error.strerror or error}", error=True)
        sys.exit(EXIT_FAILED)
    except json.JSONDecodeError as error:  # a file of a run that was cut off or edited
        say(str(error), error=True)
        sys.exit(EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def say(line: str, *, error: bool = False) -> None:
    stream = sys.stderr if error else sys.stdout
    stream.write(without_secrets(line) + "\n")
    stream.flush()


@app.command
def ingest(source: str, dest: str, *, set: Set = []) -> int:
    """Raw images to a checked dataset directory. Ctrl-C says how far it is (exit 75); the same command goes on.

    SOURCE: a folder of images (or of archives); a .zip; tars, plain or compressed, also '{000..099}.tar' and globs; a
    URL of any of these (s3://, gs://, file://); or sklearn:digits. DEST: a local directory.

    Keys of --set, which the README has in a table. Labels: labels, class_names, image_column, label_column, masks,
    mask_classes, boxes. Splits: splits, split_fractions, split.group, seed. Images: channels, colour, max_side,
    quality, format, max_pixels, max_image_seconds, max_read_seconds, max_rejected_fraction, examine. Copies:
    duplicates, leakage_against. Shards: samples_per_shard, tars, workers.
    """
    from flows.command_line.commands import ingest_command

    return ingest_command(source, dest, set, say)


@app.command
def check(dataset: str, *, full: bool = False) -> int:
    """Exit 0 if the dataset is sound, 1 with every fault named, 2 if there is no such path."""
    from flows.command_line.commands import check_command

    return check_command(dataset, full, say)


@app.command
def plan(recipe: str, *, data: Data = [], profile: str = "local", set: Set = [], dir: Dir = None) -> int:
    """What a run would be: batches, steps, parameters, arithmetic, memory per ZeRO stage, checkpoint size."""
    from flows.command_line.commands import plan_command

    return plan_command(recipe, data, profile, set, dir, say)


@app.command
def pretrain(
    recipe: str, *, data: Data = [], profile: str = "local", set: Set = [], dry_run: bool = False,
    rehearse: Rehearse = None, run_dir: str | None = None, watch: bool = False, dir: Dir = None,
) -> int:  # fmt: skip
    """Pretrain an encoder. Ctrl-C stops with a checkpoint (exit 75); the same command goes on.

    On a cluster it submits and returns; with --watch it follows, and Ctrl-C leaves the job to itself.
    """
    from flows.command_line.commands import training_command

    return training_command("pretrain", recipe, data=data, profile=profile, overrides=set, dry_run=dry_run,
                            rehearse=rehearse, run_dir=run_dir, directory=dir, model=None, watch=watch,
                            say=say)  # fmt: skip


@app.command
def finetune(
    model: str, *, data: Data = [], recipe: str = "finetune_vit", profile: str = "local", set: Set = [],
    dry_run: bool = False, rehearse: Rehearse = None, run_dir: str | None = None, watch: bool = False, dir: Dir = None,
) -> int:  # fmt: skip
    """Fine-tune a MODEL (a run, a checkpoint, models:/NAME@ALIAS, a weights file) on a labelled dataset."""
    from flows.command_line.commands import training_command

    return training_command("finetune", recipe, data=data, profile=profile, overrides=set, dry_run=dry_run,
                            rehearse=rehearse, run_dir=run_dir, directory=dir, model=model, watch=watch,
                            say=say)  # fmt: skip


@app.command
def sweep(
    recipe: str, *, data: Data = [], profile: str = "local", set: Set = [], dir: Dir = None
) -> int:  # fmt: skip
    """Train every combination of the values in brackets: --set 'optimizer.learning_rate=[1e-3,3e-4]'; one table.

    On this machine one run after the other, Ctrl-C stops; on a cluster an array, Ctrl-C leaves it to itself. The same
    command goes on with what is not done.
    """
    from flows.command_line.commands import sweep_command

    return sweep_command(recipe, data, profile, set, dir, say)


@app.command
def ladder(
    recipe: str, *, data: Data = [], profile: str = "local", set: Set = [], dry_run: bool = False, dir: Dir = None
) -> int:  # fmt: skip
    """Train small encoders on slices of the data, and forecast what RECIPE's own run will score, take and cost.

    --dry-run shows the rungs and what they take by their plan; --set ladder.sizes=[ti,s],
    ladder.fractions=[0.1,0.2,0.4] and ladder.budget_hours=N choose them. The same command goes on with what is not
    done; a later `vit pretrain RECIPE` on the same data is told the forecast and the bands of its health.
    """
    from flows.command_line.commands import ladder_command

    return ladder_command(recipe, data, profile, set, dry_run, dir, say)


@app.command
def study(file: str, *, set: Set = [], dry_run: Switch = False, dir: Dir = None) -> int:
    """A grid of networks, shares of a dataset and objectives: each pretrained and scored; one table, one plot.

    FILE is a study's YAML, or the name of a shipped one; --set sets its keys, for example --set data=DATASET. --dry-run
    shows the cells and what they cost. Ctrl-C stops with checkpoints; the same command goes on with what is not done.
    """
    from flows.command_line.commands import study_command

    return study_command(file, set, dry_run, dir, say)


@app.command
def evaluate(
    model: str, *, data: str | None = None, protocol: Protocols = [], suite: str | None = None,
    profile: str = "local", set: Set = [], run_dir: str | None = None, dir: Dir = None,
) -> int:  # fmt: skip
    """Score a MODEL on a labelled dataset under named protocols, or on all that a suite file names."""
    from flows.command_line.commands import evaluate_command

    return evaluate_command(model, data, protocol, suite, profile, set, run_dir, dir, say)


@app.command
def embed(
    model: str, dest: str, *, data: str | None = None, query: Queries = [], profile: str = "local", set: Set = [],
    dir: Dir = None,
) -> int:  # fmt: skip
    """Features of every image of a dataset as parquet files in DEST; what is there already is not made again.

    --query IMAGE shows the images of the dataset that are most like it.
    """
    from flows.command_line.commands import embed_command

    return embed_command(model, dest, data, query, profile, set, dir, say)


@app.command
def register(model: str, *, name: str, set: Set = [], dir: Dir = None) -> int:
    """Register a trained run or checkpoint in MLflow, with its evaluations and where it came from.

    --set licence=NAME goes into the model card; --set promotion_margin=0.01 is how much better a version must be that
    cannot be compared image by image; --set evaluations=[RUN] names evaluations that lie elsewhere.
    """
    from flows.command_line.commands import register_command

    return register_command(model, name, set, dir, say)


@app.command
def inspect(model: str, *images_dest: str, set: Set = [], dir: Dir = None) -> int:
    """Draw what a MODEL learned: filters, positions, attention, features, reconstructions, and a page of them.

    IMAGES are a dataset directory, a folder, a glob or image files; the last name is DEST, a folder for the pictures.
    --set images=8 says how many are looked at; with --set mask=FILE a masked autoencoder fills in what FILE has white.
    """
    from flows.command_line.commands import inspect_command

    return inspect_command(model, images_dest, set, dir, say)


@app.command
def export(
    model: str, dest: str, *, format: str, data: str | None = None, set: Set = [], dir: Dir = None
) -> int:  # fmt: skip
    """A MODEL for other programs, in the new folder DEST: safetensors (timm), hf (transformers), onnx, pt2, int8.

    It is opened there as anybody would and held against the model on a fixed sample of images (of --data, or of what
    the model was trained on): size, latency, memory, largest difference, agreement, accuracy in a table and in
    DEST/export.json. Out of bounds nothing is written, exit 1. Keys of --set: images, repeats, bounds.max_difference,
    bounds.min_agreement, bounds.max_accuracy_drop, token_reduction.keep.
    """
    from flows.command_line.exports import export_command

    return export_command(model, dest, format, data, set, dir, say)


@app.command
def models(*, dir: Dir = None) -> int:
    """What is registered: versions, aliases, what each was trained on, its headline metric. A line a version."""
    from flows.command_line.lineage import models_command

    return models_command(dir, say)


@app.command
def explain(
    model: str, *, json: Switch = False, reproduce: Switch = False, contains: str | None = None, dir: Dir = None
) -> int:  # fmt: skip
    """Where a MODEL comes from: evaluations, run, config, code, data, and the same of its parents.

    --json: the same for programs. --reproduce: a shell script that trains it again from a clone. --contains IMAGE: was
    this image, or a near copy, in the training data of the model or of its parents; in which epochs and steps.
    """
    from flows.command_line.lineage import explain_command

    return explain_command(model, json, reproduce, contains, dir, say)


@app.command
def takedown(dataset: str, key: str, *, reason: str, dir: Dir = None) -> int:
    """Put the sample KEY on the DATASET's tombstone list; names every model that learned from it.

    Runs that begin or resume afterwards read the next sample of its shard instead. The bytes stay in the tar.
    """
    from flows.command_line.lineage import takedown_command

    return takedown_command(dataset, key, reason, dir, say)


@app.command
def runs(*, dir: Dir = None) -> int:
    """What runs where."""
    from flows.command_line.runs import runs_command

    return runs_command(dir, say)


@app.command
def logs(run: str, *, dir: Dir = None) -> int:
    """The log of a run's newest attempt, and of its job's script on a cluster."""
    from flows.command_line.runs import logs_command

    return logs_command(run, dir, say)


@app.command
def stop(run: str, *, dir: Dir = None) -> int:
    """Stop a run with a checkpoint, wherever it runs; returns when nothing of it is left."""
    from flows.command_line.runs import stop_command

    return stop_command(run, dir, say)


@app.command
def resume(run: str, *, set: Set = [], dir: Dir = None) -> int:
    """Go on with a run from its newest checkpoint; --set changes only what does not change the training.

    A run whose job lives on a cluster is followed instead; Ctrl-C leaves it to itself.
    """
    from flows.command_line.runs import resume_command

    return resume_command(run, set, dir, say)


@app.command
def replay(run: str, step: int, *, dir: Dir = None) -> int:
    """One step of a run again, from the nearest checkpoint: its loss, and that of every sample, the worst first."""
    from flows.command_line.runs import replay_command

    return replay_command(run, step, dir)


@app.command
def reconcile(*, dir: Dir = None) -> int:
    """Forward what MLflow has not seen of every run's ledger, and set the status it should have."""
    from flows.command_line.commands import reconcile_command

    return reconcile_command(dir, say)


@app.command
def up(*, dir: Dir = None, data: str | None = None, profile: str = "local") -> int:
    """Start the local stack: Prefect server, MLflow server, one worker, all deployments.

    --profile team, or a file of `kind: team`: servers for several people, on PostgreSQL and with passwords.
    """
    from flows.command_line.services import up_command

    return up_command(dir, data, profile, say)


@app.command
def down(*, dir: Dir = None) -> int:
    """End every process that `vit up` started in this home."""
    from flows.command_line.services import down_command

    return down_command(dir, say)


@app.command
def status(*, dir: Dir = None) -> int:
    """What of the servers and the worker lives and answers."""
    from flows.command_line.services import status_command

    return status_command(dir, say)


@app.command
def lifecycle(
    source: str, *, name: str, pretrain_recipe: str = "pretrain_mae_vit_s16", finetune_recipe: str = "finetune_vit",
    scratch_recipe: str | None = None, downstream: str | None = None, profile: str = "local", set: Set = [],
    finetune_set: FinetuneSet = [], ingest_set: IngestSet = [], dir: Dir = None,
) -> int:  # fmt: skip
    """The whole path on your images: ingest, pretrain, fine-tune, evaluate, register under NAME, a report at its end.

    SOURCE: what `vit ingest` takes, or a dataset directory. --set is of the pretraining recipe and the profile,
    --finetune-set of the fine-tuning, --ingest-set of the ingestion; --downstream names the labelled dataset to
    fine-tune and evaluate on where SOURCE has no labels; --scratch-recipe trains the same network without the
    pretraining beside it. Ctrl-C stops with a checkpoint (exit 75); the same command goes on.
    """
    from flows.command_line.lifecycles import lifecycle_command

    return lifecycle_command(
        source, dir, say, name=name, pretrain_recipe=pretrain_recipe, finetune_recipe=finetune_recipe,
        scratch_recipe=scratch_recipe, downstream=downstream, profile=profile, set=set, finetune_set=finetune_set,
        ingest_set=ingest_set,
    )  # fmt: skip


@app.command
def quickstart(*, dir: Dir = None) -> int:
    """The whole path on handwritten digits: ingest, pretrain, fine-tune, evaluate, register. Minutes on two cores."""
    from flows.command_line.lifecycles import quickstart_command

    return quickstart_command(dir, say)
