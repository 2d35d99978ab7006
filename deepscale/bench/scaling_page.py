"""A scaling study as a figure and as a page in Markdown that is read in a minute."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepscale import drawing
from deepscale.bench import scaling_pipeline
from deepscale.bench.report import markdown, number
from deepscale.bench.scaling_study import MB, MODES, Study

WHAT = {"strong": "the same batch over all ranks", "weak": "the same batch on each rank"}
FORMULAS = """\
P parameters are 4 P bytes: gradients are averaged and weights gathered in float32 at every precision. Every collective goes round a ring of n ranks;
of a tensor of b bytes a rank sends b (n - 1)/n to gather it or to reduce and scatter it, and twice that to reduce it everywhere. So in a step without
accumulation a rank sends (n - 1)/n of

| | gradients | weights | in all |
|---|---|---|---|
| ZeRO 0 | 8 P: all-reduce | | 8 P |
| ZeRO 1, 2 | 8 P: all-reduce, of which each rank keeps its part (DeepSpeed 0.19.8) | 4 P: gathered after the step | 12 P |
| ZeRO 3 | 4 P: reduce-scatter | up to 8 P: gathered forward and again backward | up to 12 P |
| ZeRO 3, gloo | 8 P: it has no reduce-scatter of its own | up to 8 P | up to 16 P |

What ZeRO-3 does not gather twice are the last modules before forward turns into backward, a few stacks; the formula follows DeepSpeed's rules to the
element (`deepscale/plan_gather.py`). With a micro batches, ZeRO 2 sends its gradients a times and ZeRO 3 everything; ZeRO 0 and 1 once. Not in the
formula: messages' headers, the step's loss and norm (below 1 kB), and records of gradients.
"""


def page(study: Study, measured: Sequence[dict[str, Any]], figure: str | None) -> str:
    """The page; `measured` says by which commands on which machine."""
    sizes = study.sizes
    machine = measured[0]["hardware"]
    where = f"{machine['CPU']}, {machine['cores']} cores, {machine['memory']}, GPU: {machine['GPU']}"
    packages = ", ".join(f"{name} {version}" for name, version in measured[0]["versions"].items() if name != "ffcv")
    launches = sorted({len(point.launches) for point in study.points.values()})
    lines = [
        "# Scaling over ranks",
        "",
        f"{sizes['depth']:,} layers, width {sizes['width']}, batch {sizes['batch_size']} (strong: over all ranks; weak: on each rank), 32x32 images,",
        f"{sizes['threads']} thread and core a rank. {where}; {packages}.",
        f"{_number_of(launches) + ' of each point with ' if launches else ''}{sizes['steps']} timed steps; medians.",
        "",
        *[f"- {sentence}" for sentence in findings(study)],
        "",
    ]
    if figure is not None:
        lines += [f"![Speed, communication, bytes and memory against ranks]({figure})", ""]
    for mode in MODES:
        rows = study.rows(mode)
        if rows:
            lines += [f"## {mode.capitalize()} scaling: {WHAT[mode]}", "", *_table(rows), ""]
    pipelines = scaling_pipeline.section(study.pipelines)
    if not study.points:
        return "\n".join([*lines, *pipelines])
    lines += [
        "Efficiency: images/s against those of one rank times the cores that the ranks have. Sent: bytes that left a rank in a step, as the kernel",
        "counts them for its TCP connections, in the mean over ranks. Memory: peak of the largest rank over the process with everything imported,",
        f"which takes {_process(study)} MB more. In communication: share of a rank's time inside collectives, noted in steps of their own;",
        "**waiting for a slower rank is in it**. MB are 1e6 bytes.",
        "",
        *pipelines,
        "## Bytes, by formula",
        "",
        FORMULAS,
        "## Measure again",
        "",
        "```bash",
        *dict.fromkeys(f"{entry['command']}" for entry in measured),
        "```",
        "",
        "Several `--json` files are put together, and this page is written, by",
        "`deepscale bench scaling --merge FILE ... --json FILE --csv FILE --figure FILE --page FILE`.",
        "Every point is also a run in MLflow's experiment `deepscale-scaling`.",
    ]
    return "\n".join(lines) + "\n"


def findings(study: Study) -> list[str]:
    """The sentences that a reader in a hurry needs."""
    found = []
    for mode in MODES:
        rows = [row for row in study.rows(mode) if row["efficiency"] is not None and row["ranks"] > 1]
        for ranks, cores, over in dict.fromkeys((r["ranks"], r["cores"], r["oversubscribed"]) for r in rows):
            own = [row for row in rows if (row["ranks"], row["cores"]) == (ranks, cores)]
            times, efficiency = _range([r["speedup"] for r in own], "{:.2f}"), _range([100 * r["efficiency"] for r in own], "{:.0f}")
            where = f"{ranks} ranks on {cores} cores (**oversubscribed**: read against {cores} cores)" if over else f"{ranks} ranks"
            found.append(f"{mode.capitalize()}, {where}: {times}x the images/s of one rank, efficiency {efficiency} %.")
    ratios = [row["sent_over_planned"] for mode in MODES for row in study.rows(mode) if row["sent_over_planned"]]
    if ratios:
        found.append(f"Bytes really sent are {_range(ratios, '{:.4f}')} of the formula's, at every ZeRO stage.")
    apart = study.losses_apart()
    if apart is not None:
        found.append(f"Losses of every step equal one rank's with the same batch within {apart:.0e}: ranks add up float32 sums in another order.")
    return found


def _range(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def _number_of(launches: Sequence[int]) -> str:
    text = " to ".join(dict.fromkeys(map(str, (launches[0], launches[-1]))))
    return f"{text} launch{'' if text == '1' else 'es'} (n = {text})"


def _process(study: Study) -> str:
    return _range([point.process_bytes / MB for point in study.points.values()], "{:.0f}")


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    heading = ["ranks", "ZeRO", "batch", "images/s", "efficiency", "sent, MB a step and rank", "formula, MB", "peak memory, MB", "in communication"]
    cells = [
        [
            f"{r['ranks']}" + (f", {r['nodes']} nodes" if r["nodes"] > 1 else "") + (f" on {r['cores']} cores (!)" if r["oversubscribed"] else ""),
            f"{r['zero']}",
            f"{r['batch_size']}",
            number(r["images_per_s"]),
            "" if r["efficiency"] is None else f"{r['efficiency']:.0%}",
            "not counted" if r["sent_bytes"] is None else f"{r['sent_bytes'] / MB:.2f}",
            f"{r['planned_bytes'] / MB:.2f}",
            f"{r['peak_bytes'] / MB:.0f}",
            f"{r['communication']:.0%}",
        ]
        for r in rows
    ]
    return markdown([heading, *cells], left=1)


def draw(study: Study, out: Path) -> None:
    """Writes the figure: speed of strong and weak scaling, share of communication, bytes sent beside the formula's, memory."""
    pyplot = drawing.pyplot()
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 7), layout="constrained")
    strong, weak = (study.rows(mode) for mode in MODES)
    stages = sorted({point.zero for point in study.points.values()})
    _speed(axes[0, 0], strong, "strong scaling: images/s")
    _speed(axes[0, 1], weak, "weak scaling: images/s")
    share: list[tuple[list[dict[str, Any]], str]] = [(strong, "-"), (weak, "--")]
    for rows, style in share:
        _lines(axes[0, 2], rows, "communication", 100.0, style)
    axes[0, 2].set(title="time in communication, waiting included\n(solid: strong, dashed: weak)", ylabel="% of a rank's time")
    several = [row for row in (strong or weak) if row["ranks"] > 1]
    _lines(axes[1, 0], several, "planned_bytes", 1 / MB, "-", marker="")
    _lines(axes[1, 0], [row for row in several if row["sent_bytes"] is not None], "sent_bytes", 1 / MB, "")
    axes[1, 0].set(title="bytes sent (points) and formula (lines);\nZeRO 1 sends what ZeRO 2 does", ylabel="MB a step and rank")
    _lines(axes[1, 1], strong or weak, "peak_bytes", 1 / MB, "-")
    axes[1, 1].set(title=f"peak memory of a rank, {'strong' if strong else 'weak'}", ylabel="MB over the process")
    ranks = sorted({point.ranks for point in study.points.values()})
    over = {point.ranks: point.cores for point in study.points.values() if point.oversubscribed}
    for axis in axes.flat[:5]:
        axis.set_xscale("log", base=2)
        axis.set_xticks(ranks, [f"{n}\non {over[n]} cores" if n in over else f"{n}" for n in ranks])
        axis.minorticks_off()
        axis.set_xlabel("ranks")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
    handles = [pyplot.Line2D([], [], color=drawing.COLOURS[zero], marker="o", label=f"ZeRO {zero}") for zero in stages]
    handles += [pyplot.Line2D([], [], color="0.4", linestyle=":", label="one rank's times the cores")]
    axes[1, 2].axis("off")
    axes[1, 2].legend(handles=handles, loc="center", frameon=False)
    sizes = study.sizes
    title = f"{sizes['depth']:,} layers, width {sizes['width']}, batch {sizes['batch_size']}"
    figure.suptitle(title + (": more ranks than cores where both are named" if over else ""))
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


def _speed(axis: Any, rows: list[dict[str, Any]], title: str) -> None:
    _lines(axis, rows, "images_per_s", 1.0, "-")
    alone = [row for row in rows if row["ranks"] == 1]
    if alone:
        best = max(row["images_per_s"] / row["cores"] for row in alone)
        points = sorted({(row["ranks"], row["cores"]) for row in rows})
        axis.plot([n for n, _ in points], [best * cores for _, cores in points], ":", color="0.4")
    axis.set(title=title, ylabel="images/s")


def _lines(axis: Any, rows: Sequence[dict[str, Any]], name: str, factor: float, style: str, marker: str = "o") -> None:
    """A line over ranks for each ZeRO stage."""
    for zero in sorted({row["zero"] for row in rows}):
        own = [row for row in rows if row["zero"] == zero]
        values = [factor * row[name] for row in own]
        colour = drawing.COLOURS[zero]
        axis.plot([row["ranks"] for row in own], values, style, marker=marker, color=colour, markeredgecolor="white", markersize=7)
