"""What a run is about to do, in a table: the first thing that its log and its terminal say. Torch-free."""

from pipeline.config.training import TrainingConfig
from pipeline.words import bytes_in_words

MEASUREMENTS = 4  # of health in a short run, as it is advised


def start_table(config: TrainingConfig, plan: dict) -> list[str]:
    """What is trained on what, for how long and how: a line each."""
    batches, steps, data = plan["batches"], plan["steps"], plan["data"]
    classes = f", {plan['num_classes']:,} classes" if plan["num_classes"] else ""
    epochs = steps["samples"] / plan["samples_per_epoch"]
    every = config.validation.every_steps
    return [
        f"model       {config.encoder.name}, {config.objective.kind}: {plan['parameters'] / 1e6:.4g} M parameters, "
        f"{plan['training_flops_per_image'] / 1e9:.4g} GFLOP per image",
        f"trained     {trained_in_words(config, plan)}",
        f"images      {plan['samples_per_epoch']:,} of {data['name']}{classes}, "
        f"{' x '.join(map(str, config.encoder.input_size))} pixels",
        f"batch       {batches['global_batch_size']:,} = {batches['world_size']} ranks x "
        f"{batches['micro_batch_size']} images x {batches['gradient_accumulation_steps']} accumulated",
        f"length      {steps['steps']:,} steps = {epochs:.4g} epochs = {steps['samples']:,} images",
        f"engine      {_engine_in_words(config, plan)}",
        f"optimizer   {config.optimizer.kind}, clip {config.optimizer.max_grad_norm or 'off'}, "
        f"moving average {_average_in_words(config)}",
        f"rate        {_rate_in_words(config, steps)}",
        f"checkpoint  {bytes_in_words(plan['checkpoint_bytes'])}, {config.checkpoint.interval_in_words(plan['nodes'])}"
        f"{', and at every validation' if every else ''}",
        f"validation  {f'every {every:,} steps' if every else 'off'}",
        f"health      {_health_in_words(config, plan)}",
        f"guard       {_guard_in_words(config)}",
        *([f"budget      {config.budget_gpu_hours:g} GPU-hours"] if config.budget_gpu_hours else []),
    ]


def trained_in_words(config: TrainingConfig, plan: dict) -> str:
    """How many of the parameters train, and by what tuning."""
    total = plan["parameters"]
    trained = plan.get("trained_parameters", total)
    share = f"trained parameters {trained:,} of {total:,} ({100 * trained / total:.3g} %)"
    return f"{share}, tuning {config.tuning.kind}" if config.tuning.freezes else share


def _average_in_words(config: TrainingConfig) -> str:
    if config.keeps_average and not config.ema_decay:
        return "of the objective's own momentum"
    return f"{config.ema_decay or 'off'}"


def _engine_in_words(config: TrainingConfig, plan: dict) -> str:
    zero, backend = config.zero, plan.get("compile_backend")
    parts = {
        f"ZeRO stage {zero.stage}" if zero.stage else "ddp": True,
        f"optimizer offloaded to the {zero.offload_optimizer}": zero.offload_optimizer != "none",
        plan["precision"]: True,
        f"compiled by {backend}": backend is not None,
        "activations computed again": config.activation_checkpointing,
        "deterministic": config.deterministic,
    }
    return ", ".join(words for words, said in parts.items() if said)


def _rate_in_words(config: TrainingConfig, steps: dict) -> str:
    optimizer, batch = config.optimizer, config.global_batch_size
    words = f"{optimizer.learning_rate:.3g}, warm-up {steps['warmup_samples'] // batch:,} steps, then "
    end = f"to {optimizer.end_learning_rate:.3g}"
    if optimizer.schedule != "constant":
        return f"{words}{optimizer.schedule} {end}"
    cooldown = steps.get("cooldown_samples", 0) // batch
    return f"{words}constant" + (f", and over the last {cooldown:,} steps down {end}" if cooldown else "")


def off_in_words(plan: dict, steps: int) -> str:
    """Why health is not measured, and what to set so that it is."""
    if plan.get("rehearsal"):
        return "off in a rehearsal"
    if plan.get("health_asked", 0) == 0:  # plans of before do not say who asked for it
        return "off: health.every_steps is 0"
    often = max(1, steps // MEASUREMENTS)
    return f"off: a run of {steps:,} steps is too short for it; --set health.every_steps={often}"


def _health_in_words(config: TrainingConfig, plan: dict) -> str:
    health = config.health
    if not health.every_steps:
        return off_in_words(plan, plan["steps"]["steps"])
    act = {"report": "said", "stop": "a stop", "escalate": "told to Prefect"}[health.policy]
    when = f", after {health.patience} bad ones in a row" if health.policy != "report" else ""
    return f"every {health.every_steps:,} steps, from {health.images:,} images of a split; what is bad is {act}{when}"


def _guard_in_words(config: TrainingConfig) -> str:
    guard = config.guard
    leap = f"; bad is a leap of the loss by {guard.spike_threshold:g} deviations too" if guard.spike_threshold else ""
    return f"{guard.max_skipped} bad steps in a row are gone back over, at most {guard.max_roll_backs} times{leap}"
