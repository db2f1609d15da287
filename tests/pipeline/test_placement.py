"""Ranges of nodes: which are refused before submission."""

import pytest

from pipeline.config.training import PretrainConfig
from pipeline.errors import InputError
from pipeline.preparation.placement import Placement, placed, require_every_size
from tests.recipes import load_recipe


def test_a_range_in_which_some_number_of_nodes_cannot_divide_the_batch_is_refused_with_those_that_can():
    settings = ("data.sources=[{path: x}]", "global_batch_size=96", "micro_batch_size=4")
    config = load_recipe(PretrainConfig, "pretrain_mae_debug", settings)
    placement = Placement("slurm", 4, 2, 1, 0, nodes_range=(2, 4))
    require_every_size(config, placement, 2, 4)
    with pytest.raises(
        InputError,
        match="profile.nodes 2-6: global_batch_size 96 does not divide over 5 nodes of 2 ranks with micro_batch_size "
        "4; of this range 2, 3, 4 and 6 can: set profile.nodes",
    ):
        require_every_size(config, placement, 2, 6)
    with pytest.raises(InputError, match="of this range none can"):
        require_every_size(config, placement, 5, 5)
    plan = placed({"kept": 1}, config, placement)
    assert (plan["kept"], plan["nodes"], plan["nodes_range"], plan["world_size"]) == (1, 4, [2, 4], 8)
    assert plan["batches"]["gradient_accumulation_steps"] == 3
