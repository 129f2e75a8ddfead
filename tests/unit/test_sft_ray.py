"""Before Ray: what it is started with, and whether the cluster can hold the workers."""

import pytest
import ray

from verl_dft.errors import InputError
from verl_dft.training.configure import compose_training
from verl_dft.training.sft_ray import check_resources, plain_input_errors, ray_options

BASE = ["model=/some/folder", "output_dir=/tmp/never-made", "data=/some/rows.parquet", "data.train_batch_size=64"]


def config(nodes: int, workers: int, *overrides: str):
    sizes = [f"trainer.nnodes={nodes}", f"trainer.n_gpus_per_node={workers}"]
    return compose_training([*BASE, "launcher=ray", *sizes, *overrides])


@pytest.mark.parametrize(
    ("nodes", "workers", "machines"),
    [
        (2, 2, [(2, 20), (2, 20)]),
        (2, 2, [(4, 40)]),  # both groups on one machine
        (1, 8, [(0, 64), (8, 96)]),
        (4, 1, [(3, 32), (1, 10)]),
    ],
)
def test_clusters_that_hold_the_workers(nodes: int, workers: int, machines: list[tuple[int, int]]) -> None:
    check_resources(config(nodes, workers), [{"GPU": gpus, "CPU": cpus} for gpus, cpus in machines], "GPU")


@pytest.mark.parametrize(
    ("nodes", "workers", "machines", "room"),
    [
        (1, 4, [(2, 64), (2, 64)], 0),  # enough in all, on no machine
        (2, 2, [(2, 40), (2, 19)], 1),
        (2, 2, [(3, 64), (1, 64)], 1),
        (1, 1, [], 0),
    ],
)
def test_clusters_that_never_will(nodes: int, workers: int, machines: list[tuple[int, int]], room: int) -> None:
    with pytest.raises(InputError, match=f"has room for {room} .*--num-cpus") as error:
        check_resources(config(nodes, workers), [{"GPU": gpus, "CPU": cpus} for gpus, cpus in machines], "GPU")
    assert f"{nodes} machine(s) with {workers} GPU and {10 * workers} CPU" in str(error.value)


def test_other_accelerators_have_other_names() -> None:
    check_resources(config(1, 2), [{"NPU": 2, "CPU": 20}], "NPU")
    with pytest.raises(InputError, match="2 NPU"):
        check_resources(config(1, 2), [{"GPU": 2, "CPU": 20}], "NPU")


def test_a_local_ray_has_the_cpus_that_verl_reserves(monkeypatch: pytest.MonkeyPatch) -> None:
    """With GPUs as well, where their number is Ray's to find."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for hardware in ("cpu", "gpu"):
        options = ray_options(config(1, 8, f"hardware={hardware}"))
        check_resources(config(1, 8), [{"GPU": 8, "CPU": options["num_cpus"]}], "GPU")
        assert ("num_gpus" in options) == (hardware == "cpu")
    assert ray_options(config(1, 8, "+ray_init.num_cpus=99"))["num_cpus"] == 99
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not {"num_cpus", "num_gpus", "address"} & set(ray_options(config(2, 8)))


def test_a_workers_input_error_is_one_line() -> None:
    error = ray.exceptions.RayTaskError("train_batch", "Traceback\n  wall", InputError("the rows are wrong"))
    with pytest.raises(InputError) as caught, plain_input_errors():
        raise error.as_instanceof_cause()
    assert str(caught.value) == "the rows are wrong"
    with pytest.raises(ray.exceptions.RayTaskError), plain_input_errors():
        raise ray.exceptions.RayTaskError("train_batch", "Traceback", ZeroDivisionError()).as_instanceof_cause()
