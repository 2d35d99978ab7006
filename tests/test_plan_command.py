"""`deepscale plan`: what it prints, the numbers for scripts, the command to paste, and bad input."""

import json
import shlex
from typing import Any

import pytest

from deepscale import plan, plan_command, plan_table
from deepscale.config import ACTIVATION_POLICIES, flat, parse
from deepscale.errors import UsageError
from deepscale.plan_memory import FITS

ON_A_GPU = ("--depth", "10000", "--width", "64", "--batch-size", "64", "--device-memory", "24GiB", "--host-memory", "128GiB")


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "measure_step_s", lambda config, world, images: 1.5)
    monkeypatch.setattr(plan, "CORE_FLOPS", float("inf"))
    monkeypatch.setattr(plan_command, "measure_step_s", lambda config, world, images: 1.5)


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str]) -> Any:
    """`planned("--depth", "26")`: the record that --json prints, and nothing else on standard output."""

    def run(*arguments: str) -> dict[str, Any]:
        plan_command.main([*arguments, "--json"])
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


def pasted(command: str) -> dict[str, Any]:
    """The settings of a command, as train.py reads them."""
    words = shlex.split(command)
    return flat(parse(words[next(i for i, word in enumerate(words) if word.startswith("--") and word != "--num_gpus") :]))


def test_a_plan_for_a_gpu_that_is_not_here(planned: Any) -> None:
    found = planned(*ON_A_GPU)
    assert found["parameters"] == 1_953_654_031
    assert found["step_s"] is None  # nothing here could time it
    assert found["flops"]["total"] == found["flops"]["forward"] + found["flops"]["backward"] + found["flops"]["again"] > 50e12
    assert {(row["zero"], row["offload"]) for row in found["choices"]} == {(z, o) for z in range(4) for o in ("none", "cpu")} - {(0, "cpu")}
    assert {row["activations"] for row in found["choices"]} == set(ACTIVATION_POLICIES)
    chosen = next(row for row in found["choices"] if all(row[name] == value for name, value in found["recommended"].items()))
    assert chosen["fits"] and chosen["device"]["peak"] == found["device_bytes"] <= FITS * 24 * 2**30
    assert set(chosen["device"]) == {"weights", "gradients", "optimizer", "buffers", "kept", "segment", "workspace", "data", "retained", "peak"}
    assert found["host_bytes"] == chosen["host"]["peak"] > 24 * 2**30


def test_states_on_a_disk_are_planned_and_shown(planned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """12 bytes a parameter and 8 of the large ones; the host is left with gradients, what is small, and buffers."""
    at = {offload: planned(*ON_A_GPU, "--zero", "3", "--offload", offload) for offload in ("cpu", "nvme")}
    host, disk, parameters = at["nvme"]["host_bytes"], at["nvme"]["choices"][0]["disk"], at["nvme"]["parameters"]
    assert 12 * parameters < disk <= 20 * parameters and at["cpu"]["choices"][0]["disk"] == 0
    assert 4 * parameters < host < 0.3 * at["cpu"]["host_bytes"]
    assert at["nvme"]["command"].endswith("--nvme-path DIR") and pasted(at["nvme"]["command"])["offload"] == "nvme"
    plan_command.main([*ON_A_GPU, "--offload", "nvme"])
    text = capsys.readouterr().out
    assert "offload to a disk" in text and "| on a disk |" in text and f"{disk / 2**30:.2f} |" in text


@pytest.mark.parametrize(
    "given",
    [
        ON_A_GPU,
        (*ON_A_GPU, "--ranks", "8", "--lr", "3e-3", "--layerscale-init", "none", "--no-augment", "--time-budget", "5m"),
        ("--depth", "26", "--device", "cpu", "--width", "8", "--engine", "torch"),
        ("--blocks", "1,2,3,4", "--device", "cpu", "--width", "8", "--ranks", "2", "--activations", "selective"),
        ("--depth", "110", "--device-memory", "8GB", "--zero", "3", "--offload", "cpu", "--segment", "2"),
    ],
    ids=" ".join,
)
def test_the_command_builds_what_was_planned(planned: Any, given: tuple[str, ...]) -> None:
    """Pasted, it gives the same network, engine and sizes; what was given by hand is in it."""
    found = planned(*given)
    command, settings = found["command"], found["settings"]
    ranks = int(given[given.index("--ranks") + 1]) if "--ranks" in given else 1
    assert (f"--num_gpus {ranks} " in command) is (ranks > 1)
    assert command.startswith("DS_ACCELERATOR=cpu ") is (ranks > 1 and "cpu" in given)
    typed = pasted(command)
    for name in (
        "width",
        "patch_size",
        "batch_size",
        "precision",
        "zero",
        "offload",
        "activations",
        "segment",
        "slots",
        "stack_size",
        "lr",
        "augment",
    ):
        if not (name in ("zero", "offload") and "torch" in given) and not (name in ("segment", "slots") and settings[name] is None):
            assert json.loads(json.dumps(typed[name])) == settings[name], name


def test_text_says_what_is_recommended_and_how_to_start_it(capsys: pytest.CaptureFixture[str]) -> None:
    plan_command.main([*ON_A_GPU])
    text = capsys.readouterr().out
    for part in (
        "1,953,654,031 parameters",
        "TFLOP",
        "no calibration: the device is not this machine's",
        "| ZeRO | offload |",
        "--zero 2 --offload cpu",
    ):
        assert part in text
    marked = [line for line in text.splitlines() if "<" in line.partition("|")[2]]
    assert len(marked) == 1 and marked[0].split("|")[1].strip() == "2" and "!" in text
    plan_command.main(["--depth", "26", "--device", "cpu", "--width", "8", "--host-memory", "16GiB"])
    text = capsys.readouterr().out
    assert "about 1.5 s" in text and "CPU with 14.9 GiB left" in text


def test_depths_of_every_choice(planned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned("--device-memory", "24GiB", "--host-memory", "128GiB", "--max-depth")
    deep = {(row["zero"], row["offload"], row["activations"]): row["max_depth"] for row in found["depths"]}
    assert found["sizes"] == {"width": 64, "patch_size": 1, "batch_size": 64, "precision": "bf16"}
    assert (
        deep[0, "none", "keep"]
        < deep[0, "none", "selective"]
        < deep[0, "none", "recompute"]
        < deep[2, "cpu", "recompute"]
        < deep[3, "cpu", "recompute"]
    )
    assert deep[0, "none", "keep"] > 1607  # of the original study, without recomputation, in 24 GB
    plan_command.main(["--device-memory", "1MiB", "--max-depth", "--activations", "keep"])
    assert "none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--device-memory", "much"), "'much' is not a size of memory; type for example 24GiB"),
        (("--host-memory", "4 GiBs"), "is not a size of memory"),
        (("--device-memory", "24GiB", "--device", "cpu"), "--device-memory is that of a GPU.*--host-memory"),
        (("--ranks", "0"), "0 is not a whole number from 1"),
        (
            ("--depth", "26", "--ranks", "16", "--device-memory", "24GiB", "--batch-size", "64"),
            "16 ranks are more than the 8 blocks of 26 layers.*at most 8",
        ),
        (("--depth", "26", "--ranks", "3", "--device-memory", "24GiB", "--batch-size", "64"), "--batch-size 64 does not divide over 3 ranks.*63"),
        (("--depth", "10000", "--width", "64", "--device-memory", "1GiB", "--host-memory", "128GiB"), r"need .* on the device.*--width \d+ fits"),
        (("--depth", "10000", "--width", "64", "--device", "cpu", "--host-memory", "16GiB"), r"need .* GiB, and 14.9 GiB are free; --width \d+ fits"),
        (("--engine", "torch", "--zero", "2"), "--engine torch has no ZeRO"),
    ],
)
def test_bad_input_is_a_sentence(given: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        plan_command.main(list(given))


# ------------------------------------------------------------------------------------------------------------- a cluster

CLUSTER = ("--nodes", "16", "--gpus-per-node", "8", "--device-memory", "80GiB", "--host-memory", "1TiB")


def test_a_cluster_is_planned_rank_by_rank_and_link_by_link(planned: Any) -> None:
    """128 ranks of 100,000 layers: states shared by all, host memory by those of a node, and a ring's bytes over both kinds of link."""
    found = planned(*CLUSTER, "--depth", "100000", "--width", "64")
    assert found["machine"]["ranks"] == 128
    assert found["machine"]["host_bytes"] + found["machine"]["process_bytes"] == 2**40 // 8
    whole = 4 * found["parameters"]
    cut_up = next(row["device"] for row in found["choices"] if (row["zero"], row["offload"]) == (3, "none"))
    assert whole > 78e9 and cut_up["weights"] + cut_up["gradients"] + cut_up["optimizer"] == pytest.approx(5 * whole / 128, rel=1e-6)
    sent = {row["zero"]: row for row in found["communication"]}
    for zero, times in ((0, 2), (1, 3), (2, 3), (3, 3)):
        row = sent[zero]
        assert row["sent"] == row["gpu"] == row["node"] == pytest.approx(times * whole * 127 / 128, rel=0.005)
        assert row["seconds"] == pytest.approx(row["sent"] / 25e9)  # the network's 200 Gbit/s
    assert found["command"].startswith("sbatch --nodes=16 --gpus-per-node=8 slurm/train.sbatch --depth 100001 ")
    assert pasted(found["command"].replace("--nodes=16 --gpus-per-node=8 ", ""))["zero"] == 3


def test_a_bandwidth_given_decides_the_time(planned: Any) -> None:
    sizes = ("--depth", "1004", "--width", "64")
    faster = planned(*CLUSTER, *sizes, "--node-bandwidth", "400GB", "--gpu-bandwidth", "100GB")["communication"]
    assert all(row["seconds"] == pytest.approx(row["sent"] / 100e9) for row in faster)
    inside = planned("--ranks", "8", "--device-memory", "80GiB", "--host-memory", "1TiB", *sizes)["communication"]
    assert all(row["node"] == 0 and row["seconds"] == pytest.approx(row["sent"] / 300e9) for row in inside)
    cpu = planned("--depth", "26", "--width", "8", "--device", "cpu", "--ranks", "2", "--host-memory", "64GiB")["communication"]
    assert [row["seconds"] for row in cpu] == [None] * 4 and cpu[3]["sent"] > 1.1 * cpu[1]["sent"]  # gloo's reduce-scatter
    assert planned("--depth", "26", "--device-memory", "80GiB", "--host-memory", "1TiB")["communication"] == []


def test_ranks_that_contradict_the_nodes_are_refused() -> None:
    with pytest.raises(UsageError, match="16 nodes of 8 ranks are 128, and --ranks 64 was given; leave --ranks out"):
        plan_command.main([*CLUSTER, "--ranks", "64"])


def test_the_page_has_every_network_and_says_how_it_was_written(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of its eight networks, on one node and two: rows agree with a plan of that network."""
    monkeypatch.setattr(plan_table, "DEPTHS", (1_004, 100_000))
    monkeypatch.setattr(plan_table, "WIDTHS", (64,))
    plan_command.main(["--table", "--nodes", "2", "--gpus-per-node", "4", "--device-memory", "8GiB", "--host-memory", "64GiB"])
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith(("| 1,004 ", "| 100,001 "))]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [(row[0], row[1]) for row in rows] == 2 * [("1,004", "64"), ("100,001", "64")]
    assert rows[0][3] == "yes" and rows[1][3] == "**no**" and rows[0][8] == "0" and rows[2][7] == rows[2][8] != "0"
    assert "deepscale plan --table --nodes 2 --gpus-per-node 4 --device-memory 8GiB --host-memory 64GiB > docs/plan.md" in text
    assert "## 1 node, 4 GPUs" in text and "## 2 nodes, 8 GPUs" in text
