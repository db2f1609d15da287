"""The fine-tuning flow: `prefect deployment run finetune/model --param model=models:/NAME@champion`."""

from prefect import flow
from prefect.states import State

from flows.orchestration.reporting import concluded, stop_job
from flows.requests.training import training_run


@flow(name="finetune", flow_run_name="finetune-{recipe}", on_cancellation=[stop_job])
def finetune(
    model: str,
    data: str | list[str] | None = None,
    recipe: str = "finetune_vit",
    profile: str = "local",
    set: list[str] = [],
    run_dir: str | None = None,
) -> State:
    """Fine-tune a model on a labelled dataset.

    Args:
        model: a run or checkpoint directory, models:/NAME@ALIAS, or a weights file.
        data: the dataset directory, absolute, or a list of PATH=WEIGHT; by default the one given to `vit up --data`.
        recipe: the fine-tuning recipe.
        profile: where to train.
        set: settings of the recipe or the profile, as key=value.
        run_dir: the run directory; by default a new one in the home.
    """
    return concluded(
        lambda home: training_run(
            "finetune", recipe, data=data, profile=profile, overrides=set, run_dir=run_dir, home=home, model=model
        )
    )
