"""Several real ranks: bytes that they send against the formula, losses against one rank's, and evaluation of images that do not divide."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import scaling_worker
import torch
from conftest import run_ranks

from deepscale.models.convnext import count_parameters
from deepscale.plan_communication import Cluster, communication_of, traffic_of
from deepscale.plan_gather import Sizes, _follow
from deepscale.world import World

Results = list[dict[str, Any]]
RANKS = (2, 3)
STAGES = (0, 1, 2, 3)
CASES = {f"z{zero}": {"zero": zero} for zero in STAGES} | {f"z{zero} accumulated": {"zero": zero, "accumulation": 2} for zero in (1, 2, 3)}
CASES["z3 revolve"] = {"zero": 3, "activations": "revolve", "segment": 1}  # stacks run forward again within others' backward
MADE = [(size, name) for size in RANKS for name in CASES if size == 2 or " " not in name]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Results]:
    """Results of every rank of each number of ranks."""

    def start(size: int) -> Results:
        cases = [{"name": name, "settings": CASES[name]} for ranks, name in MADE if ranks == size]
        return run_ranks("scaling_worker.py", cases, tmp_path_factory.mktemp(f"ranks{size}"), size, timeout_s=200)[0]

    with ThreadPoolExecutor() as pool:
        running: dict[int, Future[Results]] = {size: pool.submit(start, size) for size in RANKS}
        return {size: future.result() for size, future in running.items()}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The same steps in plain torch on one rank, in this process."""
    torch.manual_seed(0)
    return scaling_worker.run({"settings": {"engine": "torch"}}, World(0, 1, 0, 1, torch.device("cpu")))


@pytest.mark.parametrize(("size", "name"), MADE)
def test_ranks_send_what_the_formula_says(ranks: dict[int, Results], size: int, name: str) -> None:
    """The collectives' tensors to 0.1 kB, which loss and norm are; the kernel's count of what left each rank to 0.3 %, which gloo's headers are."""
    settings = scaling_worker.settings_of({"settings": CASES[name]})
    planned = communication_of(settings, size, channels=3, classes=10)
    for result in ranks[size]:
        whole, sent = dict(result[name]["whole"]), result[name]["sent"]
        for kind, expected in (("all_reduce", planned.all_reduced), ("reduce_scatter", planned.scattered), ("all_gather", planned.gathered)):
            assert 0 <= whole.pop(kind, 0) - expected <= 100, kind
        assert not whole
        assert 1.0 <= sent / planned.sent <= 1.003


@pytest.mark.parametrize(("size", "name"), MADE)
def test_losses_are_those_of_one_rank(ranks: dict[int, Results], alone: dict[str, Any], size: int, name: str) -> None:
    """Within 1e-5 of each loss: ranks average their gradients in float32 in another order, and AdamW passes that on."""
    expected = alone["losses"]
    assert max(expected) - min(expected) > 0.1  # the steps' images differ, and so would a rank's that took another's
    for result in ranks[size]:
        assert result[name]["losses"][: len(expected)] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("size", "name"), MADE)
def test_evaluation_counts_each_image_once_where_they_do_not_divide(ranks: dict[int, Results], size: int, name: str) -> None:
    """101 images, and 2, of which one of three ranks has none: exactly the correct ones that each rank alone finds in all of them."""
    assert sum(result[name]["images_of_two"] for result in ranks[size]) == 2
    for result in ranks[size]:
        for images in (scaling_worker.EVALUATED, 2):
            correct, loss = result[name]["expected"][images]
            found = result[name]["evaluated"][images]
            assert (found["images"], round(found["accuracy"] * images, 6)) == (images, correct)
            assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert 0 < ranks[size][0][name]["expected"][scaling_worker.EVALUATED][0] < scaling_worker.EVALUATED


# ------------------------------------------------------------------------------------------------------- what is gathered


def test_without_anything_ahead_or_kept_everything_is_gathered_twice() -> None:
    """Three modules forward and backward, tensors padded to the ranks' multiple."""
    modules, order = [(5, 3), (7,), (4,)], [0, 1, 2, 2, 1, 0]
    assert _follow(modules, order, Sizes(0, 100, 0, 0), 1) == 2 * (5 + 3 + 7 + 4)
    assert _follow(modules, order, Sizes(0, 100, 0, 0), 4) == 2 * (8 + 4 + 8 + 4)


def test_what_is_used_again_soon_stays() -> None:
    """With a distance of one element the turning module is not gathered again; with all of them, none is."""
    modules, order = [(5, 3), (7,), (4,)], [0, 1, 2, 2, 1, 0]
    assert _follow(modules, order, Sizes(0, 100, 1, 0), 1) == 2 * (5 + 3 + 7 + 4) - 4
    assert _follow(modules, order, Sizes(0, 100, 100, 0), 1) == 5 + 3 + 7 + 4
    assert _follow(modules, order, Sizes(0, 100, 0, 7), 1) == 5 + 3 + 7 + 4  # never cut up: gathered once, after the step


# ------------------------------------------------------------------------------------------------------------ in a cluster


@pytest.mark.parametrize(("zero", "times"), [(0, 8), (1, 12), (2, 12)])
def test_bytes_on_the_way_are_the_rings(zero: int, times: int) -> None:
    """P parameters: (n - 1)/n of 8 or 12 P bytes from each of n ranks, the same from each node to the next, at the slower link's bandwidth."""
    settings = scaling_worker.settings_of({"settings": {"zero": zero, "device": "cuda"}})
    planned = communication_of(settings, 16, channels=3, classes=10)
    parameters = count_parameters(settings.model)
    assert planned.sent == times * parameters * 15 // 16
    inside = traffic_of(planned, Cluster(1, 16, gpu_bandwidth=1e9))
    assert (inside.gpu, inside.node, inside.seconds) == (planned.sent, 0, pytest.approx(planned.sent / 1e9))
    both = traffic_of(planned, Cluster(2, 8, gpu_bandwidth=1e9, node_bandwidth=1e8))
    assert (both.gpu, both.node, both.seconds) == (planned.sent, planned.sent, pytest.approx(planned.sent / 1e8))
    between = traffic_of(planned, Cluster(16, 1, gpu_bandwidth=1.0, node_bandwidth=1e8))
    assert (between.gpu, between.node) == (0, planned.sent)
    assert communication_of(settings, 1, channels=3, classes=10).sent == 0


def test_a_gpus_reduce_scatter_sends_half_of_gloos() -> None:
    settings = [scaling_worker.settings_of({"settings": {"zero": 3, "depth": 1004, "device": device}}) for device in ("cpu", "cuda")]
    gloo, nccl = (communication_of(one, 8, channels=3, classes=10) for one in settings)
    assert gloo.sent - nccl.sent == pytest.approx(nccl.scattered * 7 / 8, abs=8)
    assert 1.9 < nccl.gathered / nccl.scattered < 2.0
