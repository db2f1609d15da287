"""The plan of a run on as many nodes as a start has. Torch-free."""

import logging
from typing import Any

from pipeline.config.stages import read_run_config
from pipeline.preparation.placement import Placement, placed
from pipeline.preparation.write import write_deepspeed
from pipeline.run_directory import RunDirectory, write_json

log = logging.getLogger(__name__)


def replan(run: RunDirectory, nodes: int) -> dict[str, Any]:
    """Rewrite plan.json and deepspeed.json for `nodes` nodes: order, global batch and length stay. The new plan.

    InputError, and nothing is written, where the global batch does not divide.
    """
    config, plan = read_run_config(run.path), run.plan()
    names = ("ranks_per_node", "loader_workers", "accelerators_per_node")
    asked = tuple(plan.get("nodes_range") or (plan["nodes"], plan["nodes"]))
    placement = Placement("", nodes, **{name: plan[name] for name in names}, nodes_range=asked)
    changed = placed(plan, config, placement)
    write_json(run.plan_file, changed)
    write_deepspeed(run, config, changed)
    log.warning("%d nodes are here, and the plan was for %d: planned anew", nodes, plan["nodes"])
    return changed
