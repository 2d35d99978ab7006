"""The finished rows of a study as files: docs/results/STUDY/SCALE-CASE-seed=N.json, one each, in the format of sweeps/rows.py.

A study reads its rows from here and runs only what is missing. A file that cannot be read, that is another study's, or that was made with
other settings than the study has now is named in a sentence: nothing is silently taken for a result, or trained again over it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepscale.errors import UsageError
from deepscale.paths import PACKAGE, as_folder
from deepscale.studies.study import PREVIOUS, Case, FromSweep, Group, Results, Row, Study
from deepscale.sweeps import values
from deepscale.sweeps.results import as_typed

NEEDED = ("seed", "outcome", "numbers", "curves", "settings")
OWN = ("study", "scale", "case", "typed")
AWAY = "move it away to have the row run again"


@dataclass(frozen=True)
class Key:
    """A row of a study by its place: one case with one seed at one scale."""

    study: str
    scale: str
    case: str
    seed: int

    def __str__(self) -> str:
        return f"{self.scale} {self.case} seed={self.seed}"

    @property
    def name(self) -> str:
        """As a file's or a folder's name."""
        return as_folder(str(self))


def results_folder() -> Path:
    """Where rows lie: docs/results of the clone that this package is in, else of the working folder."""
    inside = PACKAGE.parent / "docs" / "results"
    return inside if inside.is_dir() else Path("docs") / "results"


def path_of(folder: Path, key: Key) -> Path:
    """The file of a row in the study's own folder."""
    return folder / f"{key.name}.json"


def typed(study: Study, scale: str, case: Case) -> dict[str, Any]:
    """What makes a row the same one later: its settings, and those of its phases."""
    settings: dict[str, Any] = study.settings(scale, case)
    if case.phases:
        settings["phases"] = {phase.name: dict(phase.settings) for phase in case.phases}
    return settings


def read(study: Study, scale: str, folder: Path, sweeps: Path | None = None) -> Results:
    """The rows of a study at a scale, of all seeds that there are. folder: the study's own; sweeps: the one above those of sweeps.

    Raises UsageError for a file that is damaged, of another study, or of other settings than the study has now.
    """
    source = study.scale(scale).sweep
    if source is not None:
        return _of_sweep(study, scale, (sweeps or results_folder()) / source.folder, source)
    found: dict[str, list[Row]] = {case.name: [] for case in study.of_scale(scale)}
    for path in sorted(folder.glob("*.json")):
        content = _content(path)
        if (content.get("study"), content.get("scale") in study.scales) != (study.name, True):
            raise UsageError(f"{path} is no row of the study {study.name}: it says study {content.get('study')!r}; {AWAY}")
        if content["scale"] != scale:
            continue
        if content["case"] not in found:
            raise UsageError(f"{path} is of the case {content['case']!r}, which the study {study.name} does not have at {scale} scale; move it away")
        _refuse_other_settings(path, content["typed"], typed(study, scale, study.case(content["case"])))
        found[content["case"]].append(_row(path, content))
    return _results(study, scale, found)


def _of_sweep(study: Study, scale: str, folder: Path, source: FromSweep) -> Results:
    rows = [(path, _content(path)) for path in sorted(folder.glob("*.json"))]
    found: dict[str, list[Row]] = {}
    for case in study.of_scale(scale):
        own = {name: as_typed(text) for name, text in case.settings.items()}
        found[case.name] = [_row(path, content) for path, content in rows if content.get("varied") == own]
    if rows and not any(found.values()):
        raise UsageError(f"{folder} holds {len(rows)} rows, none of which is a case of the study {study.name}; they come from: {source.commands[0]}")
    return _results(study, scale, found)


def _results(study: Study, scale: str, found: Mapping[str, list[Row]]) -> Results:
    groups = {}
    for name, rows in found.items():
        groups[name] = Group(study.case(name), tuple(sorted(rows, key=lambda row: row.seed)), study.converged)
    return Results(study, scale, groups)


def _content(path: Path) -> dict[str, Any]:
    """Raises UsageError for a file that is no row."""
    try:
        content = json.loads(path.read_text())
        missing = [name for name in NEEDED if name not in content] if isinstance(content, dict) else list(NEEDED)
        if not missing and "study" in content:
            missing = [name for name in OWN if name not in content]
        kinds: tuple[tuple[str, type], ...] = (("seed", int), ("numbers", dict), ("curves", dict), ("settings", dict))
        wrong = [] if missing else [name for name, kind in kinds if not isinstance(content[name], kind)]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({error}); {AWAY}") from None
    if missing or wrong:
        raise UsageError(f"{path} is no row of a study: {', '.join(missing or wrong)} {'is missing' if missing else 'is of another kind'}; {AWAY}")
    return dict(content)


def _refuse_other_settings(path: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    other = [name for name in {**stored, **now} if not _same(name, stored.get(name), now.get(name))]
    if other:
        was, is_now = (", ".join(f"{name} {said.get(name, 'not given')}" for name in other) for said in (stored, now))
        raise UsageError(f"{path} was made with {was}, and the study has {is_now} now; {AWAY}")


def _same(name: str, one: Any, other: Any) -> bool:
    """Whether two texts are one value of a setting: "1e-3" and "0.001"."""
    if one == other or not isinstance(one, str) or not isinstance(other, str) or name not in values.KNOWN or PREVIOUS in one + other:
        return bool(one == other)
    return bool(values.value(name, one) == values.value(name, other))


def _row(path: Path, content: Mapping[str, Any]) -> Row:
    varied = content.get("varied", {})
    case = content.get("case") or " ".join(f"{name}={text}" for name, text in varied.items())
    finite = {name: float(value) for name, value in content["numbers"].items() if isinstance(value, (int, float))}
    curves = {name: _finite(points) for name, points in content["curves"].items()}
    profiles = {name: {moment: _finite(points) for moment, points in moments.items()} for name, moments in content.get("profiles", {}).items()}
    about = {name: content.get(name) for name in ("commit", "hardware", "versions", "started", "sweep")}
    settings = {name: str(value) for name, value in content["settings"].items()}
    return Row(
        case, content["seed"], content["outcome"], finite, curves, profiles, settings, varied, content.get("verdict") or "", about, path,
    )  # fmt: skip


def _finite(points: list[list[float | None]]) -> list[list[float]]:
    """What was not finite is null in the file, and NaN here: a curve breaks there."""
    return [[float("nan") if value is None else value for value in point] for point in points]
