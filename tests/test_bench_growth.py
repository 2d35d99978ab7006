"""Cost against depth: the fit against known laws, the table and the figure from made-up measurements, and one process for real."""

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from deepscale import drawing
from deepscale.bench import deep, growth, main, networks
from deepscale.bench.growth import DEPTHS, KEEP, PLAIN, SMALLEST, STACKED, fit, fits_of
from deepscale.bench.kept import kept_bytes
from deepscale.errors import MissingPackageError, UsageError
from deepscale.world import World

# --------------------------------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize(("exponent", "factor"), [(1.0, 0.5), (0.5, 3.0), (0.0, 2.0), (2.0, 1e-6)])
def test_a_power_law_is_found_again(exponent: float, factor: float) -> None:
    law = fit(DEPTHS, [factor * n**exponent for n in DEPTHS])
    assert law.exponent == pytest.approx(exponent, abs=1e-9)
    assert law.factor == pytest.approx(factor, rel=1e-9)
    assert law.residual == pytest.approx(1.0, abs=1e-9)
    assert (law.first, law.last) == (26, 10_001)


def test_the_residual_is_the_usual_factor_off_the_law() -> None:
    """Twice the law, half of it, half of it and twice: no line through them is better than the law, and they are off by 2."""
    layers = [10, 100, 1_000, 10_000]
    law = fit(layers, [factor * n for factor, n in zip((2, 0.5, 0.5, 2), layers, strict=True)])
    assert law.exponent == pytest.approx(1.0)
    assert law.residual == pytest.approx(2.0)


def test_the_fit_is_that_of_torch() -> None:
    """Against a general solver of least squares, on values that follow no law."""
    values = [3.0, 3.1, 4.0, 9.0, 20.0, 90.0]
    x = torch.tensor(DEPTHS, dtype=torch.float64).log()
    solution = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), torch.tensor(values, dtype=torch.float64).log()[:, None]).solution
    law = fit(DEPTHS, values)
    assert [law.exponent, law.factor] == pytest.approx([solution[0].item(), solution[1].exp().item()])


def test_a_constant_bends_the_whole_range_and_not_the_deep_half() -> None:
    laws = fits_of({n: 1.0 + 0.01 * n for n in DEPTHS})
    assert laws["all"].exponent < 0.8 < 0.9 < laws["deep half"].exponent < 1.0
    assert (laws["deep half"].first, laws["deep half"].last) == (1_004, 10_001)
    assert fits_of({n: float(n) for n in DEPTHS[:4]})["deep half"].first == 110  # of four depths three, not two


# ------------------------------------------------------------------------------------------------------------- the bench


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--depths", "25", "26", "302", "1004"], "are 3 different depths; type at least four"),
        (["--depths", "3"], "out of range"),
        (["--engine", "other"], "invalid choice"),
        (["--out", "no/such/folder/figure.png"], "--out no/such/folder/figure.png is no file in a folder that is there"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "_measure", lambda *_: pytest.fail("something was measured"))
    with pytest.raises(UsageError, match=sentence):
        main(["growth", *arguments])


def test_a_figure_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise MissingPackageError("matplotlib", None, "drawing")

    monkeypatch.setattr(drawing, "pyplot", missing)
    monkeypatch.setattr(growth, "_measure", lambda *_: pytest.fail("something was measured"))
    with pytest.raises(MissingPackageError):
        main(["growth", "--out", "growth.png"])


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """Processes and counts by known laws, and the options that the processes were asked with."""
    asked: list[Mapping[str, Any]] = []

    def run(module: str, options: Mapping[str, Any], *, threads: int, limit_s: float) -> dict[str, Any]:
        asked.append(options)
        n = options["depth"]
        step = 1e-3 * n * (3 if options.get("network") == "plain" else 1)
        done = {"build_cpu_s": 0.25 * n**0.5, "start_cpu_s": 0.75 * n**0.5, "step_cpu_s": [9 * step, step, step]}
        return done | {"peak_bytes": 10**9 + 2e5 * n, "imported_bytes": 10**9}

    monkeypatch.setattr(growth, "run_worker", run)
    monkeypatch.setattr(growth, "_kept", lambda values, depth, segment, plain: 1e4 * depth / (segment or 1) * (1.2 if plain else 1))
    return asked


def test_exponents_and_goals_come_from_the_measurements(made_up: list[Mapping[str, Any]], tmp_path: Path) -> None:
    """Steps of a linear law whose first is nine times as long, starts that grow with the root."""
    main(["growth", "--out", str(tmp_path / "growth.png"), "--json", str(tmp_path / "growth.json")])
    record = json.loads((tmp_path / "growth.json").read_text())
    fits = record["fits"]
    assert fits["step"][STACKED]["deep half"]["exponent"] == pytest.approx(1.0)
    assert fits["start"][STACKED]["all"]["exponent"] == pytest.approx(0.5)
    assert fits["growth"][PLAIN]["all"]["exponent"] == pytest.approx(1.0)
    assert fits["kept"][STACKED]["all"]["exponent"] == pytest.approx(1.0)
    assert 0.45 < fits["kept"][SMALLEST]["deep half"]["exponent"] < 0.55
    step, start, _, kept = record["rows"]
    assert (step["median"], start["median"]) == (pytest.approx(0.0, abs=1e-9), pytest.approx(0.5))
    assert [row["reached"] for row in (step, start, kept)] == [True, True, True]
    table = {(row["network"], row["layers"]): row for row in record["records"]}
    assert table[STACKED, "10,001"]["step, CPU s"] == pytest.approx(10.001)
    assert table[PLAIN, "1,004"]["step, CPU s"] == pytest.approx(3.012)
    assert table[STACKED, "1,004"]["kept, MB"] == pytest.approx(8 * 1e4 * 1_004 / 4 / 1e6)
    assert table[KEEP, "1,004"]["growth, MB"] == ""
    assert (PLAIN, "3,002") not in table
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_each_network_is_asked_for_as_it_is_trained(made_up: list[Mapping[str, Any]]) -> None:
    """Shallow networks take more steps, the plain one goes through plain torch, the stacked ones through the chosen engine."""
    main(["growth", "--depths", "26", "110", "302", "10001", "--plain-depth", "110", "--zero", "3", "--steps", "4"])
    assert len(made_up) == 4 + 4 + 2
    plain = [options for options in made_up if options.get("network") == "plain"]
    stacked = [options for options in made_up if options.get("network") != "plain"]
    assert {options["engine"] for options in plain} == {"torch"} and [options["depth"] for options in plain] == [26, 110]
    assert {(options["engine"], options["zero"]) for options in stacked} == {("deepspeed", 3)}
    assert {options["depth"]: options["steps"] for options in stacked} == {26: 76, 110: 18, 302: 6, 10_001: 4}
    assert {options["segment"] for options in stacked if options["depth"] == 10_001} == {4, 18}


def test_plain_torch_is_measured_too() -> None:
    """What the program measures, in this process: the published network through plain torch."""
    values = Namespace(network="plain", batch_size=2, warm_up=1, steps=2)
    settings = networks.configuration(depth=26, width=4, batch_size=2, segment=0, engine="torch")
    result = deep._measure(values, settings, World(0, 1, 0, 1, torch.device("cpu")))
    assert result["losses"][2] < result["losses"][0]
    assert result["build_cpu_s"] > 0 and result["start_cpu_s"] > 0 and len(result["step_cpu_s"]) == 2
    assert result["tensors"] == len(list(networks.build(settings, plain=True).parameters()))


def test_what_is_kept_of_one_image_is_that_of_a_batch_by_its_images() -> None:
    """Counted with one image and with three, plain and stacked; what does not grow with the batch is below a thousandth."""
    for segment, plain in ((0, True), (0, False), (4, False)):
        settings = networks.configuration(depth=110, width=4, batch_size=3, segment=segment)
        images, _ = networks.random_batch(3, channels_last=not plain)
        assert kept_bytes(networks.build(settings, plain), images) == pytest.approx(
            3 * growth._kept(Namespace(width=4), 110, segment, plain), rel=1e-3
        )
