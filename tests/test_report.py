"""The report as data and files: thinning against plain loops, what is embedded, escaping, and bad input."""

import base64
import gzip
import itertools
import json
import math
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from flows import made_up_flow

from deepscale.errors import UsageError
from deepscale.gradflow.flow import BLOCK_FIELDS, LAYER_FIELDS, Flow
from deepscale.report import ReportRun, tables, write_page, write_report
from deepscale.report.page import SCRIPTS
from deepscale.report.quantities import first_layer, quantities
from deepscale.report.thin import GAP, LEVELS_PER_DECADE, chosen, edges, thin

DEPTHS = (26, 110, 1004, 10_001)
EVIL = "a </script><script>window.owned = 1</script><img src=x onerror='window.owned = 1'> & b"


def made_up_runs(count: int, records: int = 4, depths: tuple[int, ...] = DEPTHS) -> list[ReportRun]:
    """Runs of these depths in turn, every third without skips, where the gradient vanishes over 9 decades."""
    flows = {(depth, decades): made_up_flow(depth, records, decades) for depth in depths for decades in (0.0, 9.0)}
    runs = []
    for i in range(count):
        depth, decades = depths[i % len(depths)], 9.0 if i % 3 == 2 else 0.0
        numbers = {"depth": depth, "parameters": depth * 12_000, "validation_accuracy": 0.75 - 0.05 * (i % 9), "step_s": depth * 6e-4}
        numbers |= {"validation_loss": 1 + i / 100, "planned_memory_bytes": 5e8 + depth * 4e5, "peak_memory_bytes": 6e8 + depth * 5e5}
        settings = {
            "skip": "none" if decades else "identity",
            "width": str(8 << i % 2),
            "activation": "gelu",
            "data_dir": "/elsewhere/data",
            "own": f"/elsewhere/{i}",
        }
        verdict = "vanishing" if decades else "healthy"
        runs.append(
            ReportRun(f"run {i}", f"id-{i}", settings, numbers, verdict, f"{verdict}: as made up", flow=flows[depth, decades], started_s=1.79e9 + i)
        )
    return runs


def embedded(page: Path) -> Any:
    """The data inside a page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    assert found
    return json.loads(found[1])


def numbers_of(packed: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed), "<i2")


def test_a_point_is_the_geometric_mean_of_its_layers_against_a_plain_loop() -> None:
    """Zeros and non-finite values are counted, not averaged; NaN is left out; every layer is in exactly one point."""
    random = np.random.default_rng(0)
    values = 10 ** random.uniform(-30, 10, (3, 2357))
    values[random.random(values.shape) < 0.2] = 0
    values[random.random(values.shape) < 0.1] = np.nan
    values[random.random(values.shape) < 0.1] = np.inf
    values[1, :500] = 0
    broken = np.isnan(values) & (random.random(values.shape) < 0.5)
    bins = edges(values.shape[1], 100)
    assert bins[0] == 0
    assert bins[-1] == 2357
    assert set(np.diff(bins)) == {23, 24}
    found = thin(values, bins, broken)
    for r, row in enumerate(values):
        for p, (start, end) in enumerate(itertools.pairwise(bins)):
            part = [float(v) for v, b in zip(row[start:end], broken[r, start:end], strict=True) if not b]
            logs = [math.log10(v) for v in part if v > 0 and math.isfinite(v)]
            if logs:
                assert found.levels[r, p] / LEVELS_PER_DECADE == pytest.approx(sum(logs) / len(logs), abs=0.5 / LEVELS_PER_DECADE)
            else:
                assert found.levels[r, p] == GAP
            assert found.zeros[r, p] == part.count(0.0)
            assert found.nonfinite[r, p] == sum(map(math.isinf, part)) + broken[r, start:end].sum()


def test_few_layers_are_kept_one_by_one_and_the_ends_are_chosen() -> None:
    assert edges(8, 1000).tolist() == list(range(9))
    assert chosen(5, 100).tolist() == [0, 1, 2, 3, 4]
    picked = chosen(1000, 20)
    assert (len(picked), picked[0], picked[-1]) == (20, 0, 999)
    assert chosen(1, 20).tolist() == [0]
    assert len(chosen(0, 20)) == 0


@pytest.mark.parametrize("power", [-45.0, -1e-9, 0.0, 38.5])
def test_any_float32_fits_into_the_page(power: float) -> None:
    """The smallest and the largest float32, within half a step of the encoding."""
    found = thin(np.array([[10.0**power]]), edges(1, 1)).levels[0, 0]
    assert found / LEVELS_PER_DECADE == pytest.approx(power, abs=0.5 / LEVELS_PER_DECADE)


def test_a_gradient_that_turned_nan_is_not_finite_and_one_not_recorded_is_a_gap() -> None:
    flow = made_up_flow(26, 3)
    flow.nonfinite[2, 6:] = 1.0
    flow.mean_abs[2, 6:] = np.nan
    flow.output_grad_l2[2] = np.nan
    flow.output_std[1] = np.nan
    output, weight, signal = quantities(flow)
    assert output.broken[2].tolist() == [False] + [True] * 7  # stem, block and downsampling come before
    assert weight.broken[2].sum() == np.isnan(flow.mean_abs[2, flow.weights]).sum()
    assert signal.steps.tolist() == flow.steps[[0, 2]].tolist()  # a record without it is none of its records
    assert "nan" not in tables.quantity_csv(output, 3).splitlines()[2]
    assert first_layer(flow) == [(float(step), pytest.approx(float(value))) for step, value in zip(flow.steps, flow.mean_abs[:, 0], strict=True)]


def test_what_a_folder_holds(tmp_path: Path) -> None:
    """index.html names every file beside it, each CSV has every layer and record, no path of the machine, a bounded size."""
    runs = made_up_runs(4, records=5)
    page = write_report(runs, tmp_path / "report", title="experiment e")
    text, data = page.read_text(), embedded(page)
    assert "<title>experiment e: 4 runs, newest 2026-" in text
    assert "/elsewhere" not in text + "".join(path.read_text() for path in (tmp_path / "report").rglob("*.*"))
    assert not re.search(r"""(?:src|href)=(?!["']?data:)|url\(|@import|https?://""", text.split('id="data"')[0])
    assert data["settings"] == ["skip", "width"]
    named = [page.parent / path for run in data["runs"] for path in run["files"]]
    assert len(named) == 16
    assert {*named, page, page.parent / "runs.csv"} == {path for path in page.parent.rglob("*.*") if path.name != "details.js"}
    flow = runs[2].flow
    assert flow is not None
    rows = (page.parent / "runs" / "id-2" / "gradient_of_weights.csv").read_text().splitlines()
    assert rows[0] == "name,depth," + ",".join(f"step {step}" for step in flow.steps)
    read = np.array([row.split(",")[2:] for row in rows[1:]], float)
    np.testing.assert_allclose(read.T, flow.mean_abs[:, flow.weights], rtol=1e-3)
    assert len((page.parent / "runs.csv").read_text().splitlines()) == 5


def test_curves_have_at_most_1000_points_and_fewer_with_many_runs(tmp_path: Path) -> None:
    """10,001 layers: first and last record; together the points stand for all 3,333 blocks."""
    runs = made_up_runs(1, depths=(10_001,))
    for count, points in ((1, 1000), (200, 600), (1000, 250)):
        many = [replace(runs[0], id=f"{i}", flow=runs[0].flow if i < 2 else None) for i in range(count)]
        data = embedded(write_page(many, tmp_path / f"{count}.html", single_file=False))
        curve = data["runs"][0]["curves"]["output"]
        assert curve["steps"] == [1, 40]
        assert len(numbers_of(curve["y"])) == 2 * points
        assert sum(data["places"][curve["place"]]["count"]) == 3333
        assert len(data["places"]) == 2  # blocks and weights; runs of one architecture share them


def test_a_run_s_page_is_one_small_file_at_any_depth(tmp_path: Path) -> None:
    """99,998 layers and 200 records below 1 MB, zeros included; nothing beside it."""
    flow = made_up_flow(99_998, 1)
    flow.mean_abs[0, ::5] = 0.0
    shape = {name: (200, getattr(flow, name).shape[1]) for name in (*LAYER_FIELDS, *BLOCK_FIELDS)}
    flow = replace(flow, steps=np.arange(200), **{name: np.broadcast_to(getattr(flow, name)[0], size) for name, size in shape.items()})
    page = write_page([ReportRun("deep", "1", flow=flow)], tmp_path / "gradflow.html", single_file=True)
    assert page.stat().st_size < 1_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["gradflow.html"]


def test_a_single_file_embeds_what_the_folder_has_beside_it(tmp_path: Path) -> None:
    runs = made_up_runs(3)
    folder = write_report(runs, tmp_path / "folder")
    page = write_report(runs, tmp_path / "single", single_file=True)
    assert [path.name for path in page.parent.iterdir()] == ["index.html"]
    data = embedded(page)
    beside = {f"{path.relative_to(folder.parent)}": path.read_text() for path in folder.parent.rglob("*.csv")}
    assert {name: gzip.decompress(base64.b64decode(packed)).decode() for name, packed in data["files"].items()} == beside
    assert list(data["details"]) == ["id-0", "id-1", "id-2"]
    with pytest.raises(UsageError, match="embeds up to 20 runs, and these are 21"):
        write_report(made_up_runs(21, depths=(14,)), tmp_path, single_file=True)


def test_names_never_become_markup_or_paths(tmp_path: Path) -> None:
    """A hostile name and id: the page's elements are those of a harmless run, and files stay in the folder."""
    evil = ReportRun(EVIL, "../../outside", {EVIL: EVIL}, {"depth": 26}, EVIL, EVIL, flow=made_up_flow(26, 2))
    page = write_report(
        [evil, replace(evil, id="OUTSIDE"), replace(evil, id="__/__/outside")], tmp_path / "a" / "report", title=EVIL, warnings=[EVIL]
    )
    plain = write_report(made_up_runs(3, depths=(26,)), tmp_path / "plain")
    assert page.read_text().count("<script") == plain.read_text().count("<script")
    assert "<img" not in page.read_text()
    assert embedded(page)["runs"][0]["name"] == EVIL
    assert {path.name for path in tmp_path.iterdir()} == {"a", "plain"}
    assert len(list((tmp_path / "a" / "report" / "runs").iterdir())) == 3
    assert "<" not in (next((tmp_path / "a" / "report" / "runs").glob("*/details.js"))).read_text()


def test_a_broken_record_is_a_warning_beside_others_and_an_error_alone(tmp_path: Path) -> None:
    good, other = made_up_runs(2, depths=(26,))
    path = tmp_path / "gradflow.npz"
    path.write_bytes(b"PK\3\4 cut")
    broken = replace(other, flow=None, record=path)
    page = write_report([good, broken], tmp_path / "report")
    (warning,) = embedded(page)["warnings"]
    assert warning.startswith("run 1: gradflow.npz is not a readable record")
    assert str(tmp_path) not in page.read_text()
    with pytest.raises(UsageError, match="not a readable record"):
        write_report([broken], tmp_path / "report")
    flow = made_up_flow(26, 1)
    empty = replace(flow, **{name: getattr(flow, name)[:0] for name in ("steps", *LAYER_FIELDS, *BLOCK_FIELDS)})
    with pytest.raises(UsageError, match="run 1: its record is empty: no step was recorded"):
        write_report([replace(other, flow=empty)], tmp_path / "report")


def test_no_runs_no_records_and_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no run to report"):
        write_report([], tmp_path)
    without = ReportRun("a", "1", problem="it was recorded without gradient flow")
    with pytest.raises(UsageError, match="none of the 2 runs has a record of its gradient flow; of 'a': it was recorded without"):
        write_report([without, without], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        write_report(made_up_runs(1), tmp_path / "file")


def test_values_without_a_logarithm_travel_as_what_they_are(tmp_path: Path) -> None:
    """Numbers that JSON lacks: NaN is a gap, infinity its own word; numpy's scalars are numbers."""
    points = [(1.0, 0.5), (2.0, 0.0), (3.0, math.nan), (4.0, math.inf)]
    run = replace(made_up_runs(1)[0], curves={"first_layer": points}, numbers={"depth": np.int64(26), "validation_loss": float("nan")})
    found = embedded(write_page([run], tmp_path / "x.html", single_file=True))["runs"][0]
    assert found["first_layer"] == [[1.0, 0.5], [2.0, 0.0], [3.0, None], [4.0, "inf"]]
    assert found["numbers"] == {"depth": 26, "validation_loss": None}


def test_a_model_without_blocks_has_weights_alone(tmp_path: Path) -> None:
    flow = made_up_flow(26, 2)
    empty: dict[str, Any] = {name: getattr(flow, name)[..., :0] for name in Flow.__dataclass_fields__ if name.startswith("block_")}
    empty |= {name: getattr(flow, name)[:, :0] for name in ("output_mean", "output_std", "output_grad_l2", "saturated", "dead")}
    page = write_report([replace(made_up_runs(1)[0], flow=replace(flow, **empty))], tmp_path)
    assert list(embedded(page)["runs"][0]["curves"]) == ["weight"]


def test_the_wheel_carries_what_the_page_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hatchling = pytest.importorskip("hatchling.build")
    monkeypatch.chdir(REPOSITORY)
    names = zipfile.ZipFile(tmp_path / hatchling.build_wheel(str(tmp_path))).namelist()
    assert {f"deepscale/report/{name}" for name in ("page.html", "page.css", *(f"{script}.js" for script in SCRIPTS))} <= set(names)
