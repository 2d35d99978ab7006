"""What a scaling study has measured: points, and the numbers that are made of them. A point is a network on some ranks under one ZeRO stage.

Strong scaling is the same batch over all ranks, weak scaling the same batch on each; at one rank they are the same point.
"""

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from deepscale.bench import networks
from deepscale.plan_communication import communication_of

MODES = ("strong", "weak")
MB = 1e6
Key = tuple[int, int, int, int]  # nodes, ranks, ZeRO stage, batch


@dataclass
class Point:
    """`batch_size` images a step over all ranks. `cores`: different ones that the ranks are pinned to; on a GPU their GPUs."""

    nodes: int
    ranks: int
    zero: int
    batch_size: int
    device: str
    cores: int
    oversubscribed: bool
    planned_bytes: int  # that each rank sends in a step, by the formula
    launches: list[dict[str, Any]] = field(default_factory=list)

    @property
    def key(self) -> Key:
        """What tells points apart."""
        return self.nodes, self.ranks, self.zero, self.batch_size

    @property
    def step_s(self) -> float:
        """Seconds of a step: the median of each launch, and of those the median."""
        return statistics.median(statistics.median(launch["step_s"]) for launch in self.launches)

    @property
    def images_per_s(self) -> float:
        """Over all ranks."""
        return self.batch_size / self.step_s

    @property
    def sent_bytes(self) -> float | None:
        """That a rank sends in a step, as the kernel counts, in the mean over ranks and launches; None where it is not TCP that carries them."""
        found = [sent for launch in self.launches for sent in launch["sent_bytes"]]
        return None if None in found else statistics.fmean(found)

    @property
    def communication(self) -> float:
        """Share of a rank's time inside collectives, waiting for slower ranks among it, in the mean over ranks and launches."""
        return statistics.fmean(share for launch in self.launches for share in launch["communication"])

    @property
    def peak_bytes(self) -> float:
        """Of the rank that takes most, over the process with everything imported; the median of the launches."""
        return statistics.median(max(launch["peak_bytes"]) for launch in self.launches)

    @property
    def process_bytes(self) -> float:
        """The process before there was a network; the median of the launches."""
        return statistics.median(max(launch["base_bytes"]) for launch in self.launches)

    @property
    def where(self) -> str:
        """ "2 ranks", "4 ranks on 2 cores (oversubscribed)", "4 ranks on 2 nodes"."""
        text = f"{self.ranks} rank{'s' if self.ranks > 1 else ''}" + (f" on {self.nodes} nodes" if self.nodes > 1 else "")
        return text + (f" on {self.cores} cores (oversubscribed)" if self.oversubscribed else "")


def point_of(sizes: Mapping[str, Any], zero: int, batch_size: int, found: Mapping[str, Any]) -> Point:
    """A point from what the ranks of a first launch say (ranked.py)."""
    ranks, device = found["ranks"], found["device"]
    settings = networks.configuration(depth=sizes["depth"], width=sizes["width"], batch_size=batch_size, zero=zero).replace(device=device)
    planned = communication_of(settings, len(ranks), networks.CHANNELS, networks.CLASSES).sent
    nodes = sum(rank["local_rank"] == 0 for rank in ranks)
    cores = len({(rank["host"], core) for rank in ranks for core in rank["cores"]})
    if device == "cuda":
        return Point(nodes, len(ranks), zero, batch_size, device, len(ranks), False, planned)
    return Point(nodes, len(ranks), zero, batch_size, device, cores, len(ranks) * sizes["threads"] > cores, planned)


def launch_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of one launch: rank 0's steps and losses, which are all ranks', and each rank's bytes and shares."""
    ranks = found["ranks"]
    return {
        "step_s": ranks[0]["step_s"],
        "sent_bytes": [rank["sent_bytes"] for rank in ranks],
        "communication": [rank["communication_s"] / rank["noted_step_s"] for rank in ranks],
        "base_bytes": [rank["base_bytes"] for rank in ranks],
        "peak_bytes": [max(0, rank["peak_bytes"] - rank["base_bytes"]) for rank in ranks],
        "collectives": ranks[0]["collectives"],
        "losses": ranks[0]["losses"],
    }


@dataclass
class Study:
    """Points of one network: `sizes` are its depth, width, batch (of all ranks in strong, of each in weak scaling), threads and kernel.

    `pipelines`: launches of it cut into stages (scaling_pipeline.py).
    """

    sizes: dict[str, Any]
    points: dict[Key, Point] = field(default_factory=dict)
    pipelines: list[dict[str, Any]] = field(default_factory=list)

    def rows(self, mode: str) -> list[dict[str, Any]]:
        """A row of numbers for each point of strong or weak scaling; efficiency is None without a point of one rank to compare to.

        Efficiency: images/s against those of one rank times the cores that the ranks have: ranks that share cores cannot be faster than those.
        """
        batch = self.sizes["batch_size"]
        own = [p for p in self.points.values() if p.batch_size == (batch if mode == "strong" else batch * p.ranks)]
        alone = {p.zero: p for p in own if p.ranks == 1}
        return [self._row(mode, p, alone.get(p.zero)) for p in sorted(own, key=lambda p: (p.nodes, p.ranks, p.zero))]

    def _row(self, mode: str, point: Point, alone: Point | None) -> dict[str, Any]:
        sent, planned = point.sent_bytes, point.planned_bytes
        times = None if alone is None else point.images_per_s / alone.images_per_s
        return {
            "scaling": mode,
            "nodes": point.nodes,
            "ranks": point.ranks,
            "zero": point.zero,
            "batch_size": point.batch_size,
            "cores": point.cores,
            "oversubscribed": point.oversubscribed,
            "step_s": point.step_s,
            "images_per_s": point.images_per_s,
            "speedup": times,
            "efficiency": None if alone is None or times is None else times * alone.cores / point.cores,
            "sent_bytes": sent,
            "planned_bytes": planned,
            "sent_over_planned": sent / planned if sent is not None and planned else None,
            "peak_bytes": point.peak_bytes,
            "process_bytes": point.process_bytes,
            "communication": point.communication,
            "launches": len(point.launches),
        }

    def losses_apart(self) -> float | None:
        """The largest relative difference of a loss from one rank's with the same batch, over all strong points; None without such a pair."""
        strong = [p for p in self.points.values() if p.batch_size == self.sizes["batch_size"]]
        alone = next((p for p in strong if p.ranks == 1 and p.zero == 0), None) or next((p for p in strong if p.ranks == 1), None)
        if alone is None or len(strong) == 1:
            return None
        expected = alone.launches[0]["losses"]
        return max(abs(a - b) / abs(b) for p in strong for run in p.launches for a, b in zip(run["losses"], expected, strict=True))

    def as_json(self) -> list[dict[str, Any]]:
        """The points for a file, sorted."""
        return [asdict(self.points[key]) for key in sorted(self.points)]

    def csv(self) -> str:
        """All rows, strong and weak, with a heading."""
        rows = [row for mode in MODES for row in self.rows(mode)]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]) if rows else ["scaling"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: "" if value is None else f"{value:.6g}" if isinstance(value, float) else value for name, value in r.items()} for r in rows
        )
        return text.getvalue()


def points_from(records: Iterable[Mapping[str, Any]]) -> dict[Key, Point]:
    """The points of a file."""
    points = [Point(**record) for record in records]
    return {point.key: point for point in points}


def joined(studies: Sequence[Study]) -> Study:
    """One study of all, a point with the launches of every one. All must have the same sizes."""
    points: dict[Key, Point] = {}
    for key, point in ((key, point) for study in studies for key, point in study.points.items()):
        launches = [*points[key].launches, *point.launches] if key in points else point.launches
        points[key] = replace(point, launches=launches)
    return Study(studies[0].sizes, points, [record for study in studies for record in study.pipelines])
