"""The environment that a node's ranks share."""

from pipeline.launch import environment_of_ranks


def test_ranks_share_the_cores_and_a_person_may_say_otherwise(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    plan = {"ranks_per_node": 5, "accelerators_per_node": 0}
    made = environment_of_ranks(plan, {"HOME": "/home/ada"})
    assert (made["HOME"], made["OMP_NUM_THREADS"], made["OMP_WAIT_POLICY"]) == ("/home/ada", "2", "PASSIVE")
    made = environment_of_ranks(plan, {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "ACTIVE"})
    assert (made["OMP_NUM_THREADS"], made["OMP_WAIT_POLICY"]) == ("7", "ACTIVE")


def test_ranks_that_are_to_use_no_accelerator_see_none():
    of_person = {"CUDA_VISIBLE_DEVICES": "0,1"}
    hidden = environment_of_ranks({"ranks_per_node": 2, "accelerators_per_node": 0}, of_person)
    assert (hidden["CUDA_VISIBLE_DEVICES"], hidden["DS_ACCELERATOR"]) == ("", "cpu")
    seen = environment_of_ranks({"ranks_per_node": 2, "accelerators_per_node": 2}, of_person)
    assert (seen["CUDA_VISIBLE_DEVICES"], seen["DS_ACCELERATOR"]) == ("0,1", "cuda")
