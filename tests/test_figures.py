"""The pictures: every cell has the colour of what it holds, lines have no logarithm of zero, labels do not overlap."""

import time
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deepscale.errors import UsageError
from deepscale.gradflow import figures
from tests.flows import made_up_flow

pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """A logarithm of zero, an empty axis or a layout that does not fit is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def colours_of(path: Path) -> dict[str, int]:
    """How many pixels of a PNG have each of the colours that stand for cells without a logarithm."""
    image: NDArray[np.float32] = pyplot.imread(path)[..., :3]
    found = {}
    for name, colour in figures.CELLS.items():
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        found[name] = int((np.abs(image * 255 - wanted).max(-1) < 1.5).sum())
    return found


@pytest.mark.parametrize(("depth", "records"), [(26, 1), (110, 60)])
def test_heatmap_of_numbers_only(tmp_path: Path, depth: int, records: int) -> None:
    """Positive numbers: no cell has a colour that stands for something else, but for the smoothed edges of black text."""
    flow = made_up_flow(depth, records, decades=3.0)
    path = figures.heatmap(flow, tmp_path / "folder" / "heatmap.png")
    seen = colours_of(path)
    assert seen[figures.NONFINITE] == 0
    assert max(seen[figures.CLOSED], seen[figures.ZERO]) < 800
    _, axis = pyplot.subplots()
    assert figures._panel(axis, flow.output_grad_l2, np.zeros(flow.output_grad_l2.shape, bool)) == set()
    pyplot.close("all")


def test_heatmap_shows_what_has_no_logarithm(tmp_path: Path) -> None:
    """Closed by gamma, exactly zero, not finite: each in its colour, in proportion to the cells that are so."""
    flow = made_up_flow(110, 12, gamma=0.0)
    closed = colours_of(figures.heatmap(flow, tmp_path / "closed.png"))
    assert closed[figures.CLOSED] > 10_000
    assert closed[figures.NONFINITE] == 0
    flow.output_grad_l2[3:6, :12] = 0  # a third of the blocks in a quarter of the records, and next to it infinite
    flow.output_grad_l2[6:9, :12] = np.nan
    flow.nonfinite[9, :] = 0.1
    shown = colours_of(figures.heatmap(flow, tmp_path / "ill.png"))
    panel = shown[figures.ZERO] * 12
    assert panel > 200_000
    assert shown[figures.NONFINITE] == pytest.approx(panel / 12 + panel / 12, rel=0.1)  # one record of the other panel is a twelfth


def test_heatmap_without_blocks_or_without_any_gradient(tmp_path: Path) -> None:
    """A model without observed blocks has one panel; a record of zeros only is drawn; no record is a sentence."""
    flow = made_up_flow(26, 2)
    both = pyplot.imread(figures.heatmap(flow, tmp_path / "both.png")).shape
    flow.output_grad_l2[:] = np.nan
    assert pyplot.imread(figures.heatmap(flow, tmp_path / "one.png")).shape[1] < 0.6 * both[1]
    flow.mean_abs[:], flow.zeros[:] = 0, 1
    assert colours_of(figures.heatmap(flow, tmp_path / "zeros.png"))[figures.ZERO] > 100_000
    flow.steps = flow.steps[:0]
    with pytest.raises(UsageError, match="no record of gradient flow to draw"):
        figures.heatmap(flow, tmp_path / "none.png")
    with pytest.raises(UsageError, match="cannot be written"):
        (tmp_path / "file").touch()
        figures.heatmap(made_up_flow(26, 1), tmp_path / "file" / "heatmap.png")


def test_deep_heatmap_is_binned_and_quick(tmp_path: Path) -> None:
    """10,001 layers x 60 records: at most 1,000 rows, in seconds even where a machine is busy (0.6 s alone)."""
    flow = made_up_flow(10_001, 60, decades=6.0)
    _, axis = pyplot.subplots()
    assert figures._panel(axis, flow.mean_abs, np.zeros(flow.mean_abs.shape, bool)) == set()
    assert axis.images[0].get_array().shape == (1000, len(flow.steps), 4)
    pyplot.close("all")
    begin = time.monotonic()
    figures.heatmap(flow, tmp_path / "deep.png")
    assert time.monotonic() - begin < 5


def test_layer_numbers_stand_beside_their_layers() -> None:
    """The label of a depth against the row that shows it, with and without bins."""
    for depth in (26, 10_001):
        flow = made_up_flow(depth, 1)
        _, axis = pyplot.subplots()
        figures._label_depths(axis, flow.block_depths)
        labels = [int(text.get_text().replace(",", "")) for text in axis.get_yticklabels()]
        assert (labels[0], labels[-1]) == (4, depth - 1)
        rows = min(figures.ROWS, len(flow.block_depths))
        for label, place in zip(labels, axis.get_yticks(), strict=True):
            shown = flow.block_depths[np.arange(len(flow.block_depths)) * rows // len(flow.block_depths) == round(place)]
            assert shown.min() - 3 <= label <= shown.max() + 3
        pyplot.close("all")


def test_overlay(tmp_path: Path) -> None:
    """Eight flows, of which one has zeros and one nothing finite: drawn without a warning; relative depth where depths differ."""
    flows = {f"flow {i}": made_up_flow(26 if i % 2 else 110, decades=float(i), seed=i) for i in range(8)}
    flows["flow 0"].output_grad_l2[:, :20] = 0
    flows["flow 1"].output_std[:] = np.nan
    assert figures.overlay(flows, tmp_path / "overlay.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UsageError, match="nothing to draw"):
        figures.overlay({}, tmp_path / "none.png")


def test_zeros_have_a_band_below_the_lines() -> None:
    """A curve that reaches 0: the line ends there, dots of the same colour go on in the band."""
    depths = np.arange(1, 11)
    lines = {"dies": np.stack([depths, np.where(depths < 4, 0, 10.0**-depths)], 1), "lives": np.stack([depths, np.ones(10)], 1)}
    _, axis = pyplot.subplots()
    figures._lines(axis, lines, left=True)
    line, dots, other, nothing = axis.lines
    assert np.isnan(line.get_ydata()).tolist() == [True] * 3 + [False] * 7
    assert dots.get_xdata().tolist() == [1, 2, 3]
    assert dots.get_color() == line.get_color() != other.get_color()
    assert len(nothing.get_xdata()) == 0
    low, high = axis.get_ylim()
    assert 0 < low < 1e-10 < 1 < high
    pyplot.close("all")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=15))
def test_labels_stay_apart(wanted: list[float]) -> None:
    """Any heights: in order, a gap between them, within the axis; those with room stay where they are."""
    gap = 0.06
    heights = figures.apart(sorted(wanted), gap)
    assert all(after - before > gap - 1e-9 for before, after in pairwise(heights))
    assert heights[0] >= 0
    assert heights[-1] <= 1 + 1e-9
    alone = [0.1, 0.3, 0.9]
    assert figures.apart(alone, gap) == pytest.approx(alone)
