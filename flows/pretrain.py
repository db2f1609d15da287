"""The pretraining flow: `prefect deployment run pretrain/vit-l16`."""

from typing import Literal

from prefect import flow
from prefect.states import State

from flows.orchestration.reporting import concluded, stop_job
from flows.requests.training import recipe_of, training_run


@flow(name="pretrain", flow_run_name="pretrain-{encoder}-{objective}", on_cancellation=[stop_job])
def pretrain(
    encoder: str,
    objective: str = "supervised",
    data: str | list[str] | None = None,
    profile: str = "local",
    set: list[str] = [],
    run_dir: str | None = None,
    rehearse: Literal["auto", "always", "never"] = "auto",
    epochs: float | None = None,
    learning_rate: float | None = None,
    nodes: int | None = None,
) -> State:
    """Pretrain an encoder; the final state's message says what came of it.

    Args:
        encoder: which encoder, for example vit_l16; with the objective it names the recipe.
        objective: what it learns from: supervised, or mae (masked patches, no labels).
        data: the dataset directory, absolute, or a list of PATH=WEIGHT; by default the one given to `vit up --data`.
        profile: where to train: local, slurm, kubernetes, or the absolute path of a profile of yours.
        set: settings of the recipe or the profile, as key=value.
        run_dir: the run directory; by default a new one in the home.
        rehearse: a few steps at full size with a stop and a resume, and the cost of the full run. auto rehearses where
            there is no data, or where the full run would take more than a day without an accelerator.
        epochs: length of the run; by default the recipe's.
        learning_rate: at the end of warm-up; by default the recipe's.
        nodes: how many machines; by default the profile's.
    """
    flat = {"epochs": epochs, "optimizer.learning_rate": learning_rate, "profile.nodes": nodes}
    overrides = [*set, *(f"{key}={value}" for key, value in flat.items() if value is not None)]
    return concluded(
        lambda home: training_run(
            "pretrain",
            recipe_of(encoder, objective),
            data=data,
            profile=profile,
            overrides=overrides,
            run_dir=run_dir,
            home=home,
            rehearse=rehearse,
        )  # fmt: skip
    )
