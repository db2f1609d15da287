"""Going back to before a bad window: the state, the place in the data, and the record of what is passed over."""

import logging
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import torch.distributed as dist
from torch import nn

from pipeline.checkpoints.checkpoint import load_buffers, load_checkpoint
from pipeline.checkpoints.identity import require_own
from pipeline.loading.loader import Loader
from pipeline.rank import Rank
from pipeline.run_directory import RolledBack, write_atomic, write_json
from pipeline.shards.order import pass_over
from pipeline.training.engine import Engine
from pipeline.training.guard import BadSteps
from pipeline.training.supply import Supply

log = logging.getLogger(__name__)


def roll_back(
    me: Rank, bad: BadSteps, engine: Engine, loader: Loader, supply: Supply, initial: Callable[[], nn.Module]
) -> int:
    """The step to begin again at, from where `supply` and `loader` go on without the bad steps' samples. Collective.

    The state is that of the newest checkpoint before them, or where there is none that of the module `initial` makes.
    What is passed over is on disk before training goes on, so that a restart passes over it too.
    """
    batch = supply.config.global_batch_size
    positions = pass_over(np.arange(bad.first * batch, (bad.last + 1) * batch), supply.skipped)
    window = RolledBack(int(positions[0]), int(positions[-1]) + 1, bad.first, bad.last)
    if me.is_first:
        _record(me, window, loader, positions)
    step = _agreed(me, max((c.step for c in me.run.committed_checkpoints() if c.step <= bad.first), default=0))
    checkpoint = next((c for c in me.run.committed_checkpoints() if c.step == step), None)
    if checkpoint is not None:
        require_own(checkpoint.manifest, me.run, checkpoint.directory)
        load_checkpoint(engine.state, checkpoint)
        load_buffers(engine.module, checkpoint)
    else:
        module = initial()
        engine.state.begin_from(dict(module.named_parameters()))
        engine.module.load_state_dict({name: buffer for name, buffer in module.named_buffers()}, strict=False)
    supply.begin_from(checkpoint.manifest if checkpoint else {}, [*supply.rolled_back, window.positions])
    loader.begin_again(step, supply.skipped)
    log.warning(
        "steps %d to %d were bad: rolled back to step %d; positions %d to %d are passed over",
        bad.first + 1, bad.last + 1, step, window.start, window.end - 1,
    )  # fmt: skip
    return step


def _record(me: Rank, window: RolledBack, loader: Loader, positions: np.ndarray) -> None:
    """Which samples the bad steps had read: step, position and key, as in `samples/`; and the range, for a restart."""
    me.attempt.rolled_back.mkdir(exist_ok=True)
    steps = np.repeat(np.arange(window.first_step, window.last_step + 1), loader.plan.global_batch_size)
    rows = zip(steps.tolist(), positions.tolist(), loader.stream.keys(positions), strict=True)
    name = f"positions-{window.start:012d}"  # no two roll-backs pass over the same ones
    write_atomic(me.attempt.rolled_back / f"{name}.tsv", "".join(f"{s}\t{p}\t{k}\n" for s, p, k in rows))
    write_json(me.attempt.rolled_back / f"{name}.json", asdict(window))


def _agreed(me: Rank, step: int) -> int:
    """Rank 0's word; the others may not see a fresh directory yet, or see one more."""
    agreed = [step]
    if me.world_size > 1:
        dist.broadcast_object_list(agreed)
    return agreed[0]
