"""Study 1, limit: the deepest network that trains within a given memory, as `deepscale bench depth` measures it by real runs."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepscale import drawing
from deepscale.errors import DeepscaleError, UsageError
from deepscale.studies.page import amount
from deepscale.studies.stored import results_folder
from deepscale.studies.study import CPU, FULL, SMOKE, Case, Converged, Figure, Finding, Measured, Results, Scale, Study

GIB = 2**30
PUBLISHED_LAYERS, PUBLISHED_GIB = 1607, 24  # RTX 4090
PLAIN = "plain"
POLICIES = {PLAIN: "as published", "keep": "stacked", "selective": "stacked, selective recomputation", "recompute": "stacked, recomputed in segments"}
LAYERS = "deepest that trained"
DEEPER = 6.0  # times: 10,001 layers instead of 1,607


def measure(settings: Mapping[str, str], seed: int) -> Measured:
    """One policy's limit: of the stored bench that the settings name, else of one that is run now with them."""
    file = results_folder() / "bench" / settings["file"] if "file" in settings else None
    found = _read(file) if file is not None and file.is_file() else _run(settings)
    return measured(found, settings["policies"])


def measured(bench: Mapping[str, Any], policy: str) -> Measured:
    """What a bench's file says of a policy. Raises UsageError where it did not try it."""
    trials = [trial for trial in bench["trials"] if trial["policy"] == policy]
    trained = [trial for trial in trials if trial["outcome"] == "trained"]
    if not trained:
        raise UsageError(f"the stored bench tried no policy {policy}; run it again: {bench['command']}")
    deepest = max(trained, key=lambda trial: trial["layers"])
    beyond = [trial["layers"] for trial in trials if trial["outcome"] != "trained" and trial["layers"] > deepest["layers"]]
    numbers = {
        "memory, GiB": bench["sizes"]["memory"] / GIB, "width": bench["sizes"]["width"], LAYERS: deepest["layers"],
        "peak, GiB": deepest["peak"] / GIB, "s per step": min(deepest["measured"]["step_s"]), "trainings": len(trials),
        "perf/seconds": sum(trial["seconds"] for trial in trials),
    }  # fmt: skip
    numbers |= {"shallowest that did not": min(beyond)} if beyond else {}
    peaks = sorted({trial["layers"]: trial["peak"] / GIB for trial in trained}.items())
    return Measured(numbers, {"peak": peaks}, about={name: bench[name] for name in ("hardware", "versions") if name in bench})


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if not {"trials", "sizes", "command"} <= set(found):
            raise ValueError("it holds no trials")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is no file of deepscale bench depth ({error}); move it away, or measure it again") from None
    return found


def _run(settings: Mapping[str, str]) -> dict[str, Any]:
    """Raises DeepscaleError where the bench fails."""
    given = {name: text for name, text in settings.items() if name != "file"}
    given["policies"] = given["policies"] if given["policies"] != PLAIN else "keep"  # the plain network is always tried
    options = [word for name, text in given.items() for word in (f"--{name.replace('_', '-')}", text)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "depth.json"
        done = subprocess.run([sys.executable, "-m", "deepscale.cli", "bench", "depth", *options, "--json", str(path)])
        if done.returncode:
            raise DeepscaleError(f"deepscale bench depth {' '.join(options)} ended with exit code {done.returncode}")
        return _read(path)


def _times(found: Results) -> float | None:
    plain = found.mean(POLICIES[PLAIN], LAYERS)
    best = [value for name in POLICIES.values() if (value := found.mean(name, LAYERS)) is not None]
    return max(best) / plain if plain and len(best) > 1 else None


def _said(found: Results) -> str:
    times = _times(found)
    layers = {name: value for name in POLICIES.values() if (value := found.mean(name, LAYERS)) is not None}
    listed = ", ".join(f"{value:,.0f} ({name})" for name, value in layers.items())
    if not layers:
        return ""
    return f"layers: {listed}; {amount(times)} times as deep" if times else f"layers: {listed}"


def _deeper(found: Results) -> bool | None:
    times = _times(found)
    return None if times is None else times >= DEEPER


def bars(found: Results, path: Path) -> bool:
    """Peak memory of the trainings that ended well, against their depth."""
    groups = [group for group in found.groups.values() if group.rows]
    if not groups:
        return False
    figure, axis = drawing.pyplot().subplots(figsize=(7, 4.2), layout="constrained")
    for group, colour in zip(groups, drawing.COLOURS, strict=False):
        layers, peaks = zip(*group.rows[0].curves["peak"], strict=True)
        axis.plot(layers, peaks, "o-", color=colour, markersize=4, label=group.case.name)
    memory = groups[0].mean("memory, GiB")
    if memory is not None:
        axis.axhline(memory, color="#444444", linewidth=0.8, linestyle="--", label="limit")
    axis.set_xscale("log")
    axis.set_xlabel("layers")
    axis.set_ylabel("peak memory of the process, GiB")
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.25)
    drawing.save(figure, path)
    return True


STUDY = Study(
    name="limit",
    title="Limit: the deepest network within a given memory",
    question="How deep can a network be that trains within a given memory, and what moves that limit?",
    source='"Going Beyond the 1000-Layer Convolution Network" (Ludwiczuk): '
    f"{PUBLISHED_LAYERS:,} layers within {PUBLISHED_GIB} GB of an RTX 4090, width 64, batch 64, bf16",
    cases=tuple(Case(name, {"policies": policy}, {LAYERS: PUBLISHED_LAYERS} if policy == PLAIN else {}, compute=measure)
                for policy, name in POLICIES.items()),
    scales={
        SMOKE: Scale({"file": "depth.json", "memory": "1200MiB", "width": "8", "tolerance": "50", "threads": "1"}, cases=(POLICIES["keep"],),
                     note="one policy of the stored measurements, or where there are none of a coarse search within 1,200 MiB"),
        CPU: Scale({"file": "depth.json", "memory": "4GiB", "threads": "1"},
                   note="4 GiB of a CPU's memory instead of 24 GB of a GPU's, width 16, float32; the measurements stored by deepscale bench depth"),
        FULL: Scale({"file": "depth-gpu.json", "memory": "24GB", "width": "64", "device": "cuda"}, note="the original's sizes, on a GPU"),
    },
    columns={
        "memory, GiB": "memory, GiB", "width": "width", LAYERS: "deepest that trained, layers", "shallowest that did not": "shallowest that did not",
        "peak, GiB": "peak, GiB", "s per step": "s per step", "trainings": "trainings tried",
    },
    findings=(
        Finding(f"The same memory holds a network at least {DEEPER:g} times as deep as the published code's (10,001 layers instead of "
                f"{PUBLISHED_LAYERS:,}).", _deeper, _said),
    ),
    figures=(Figure("memory", "Peak memory of the process against the depth, of every training that ended well.", bars),),
    converged=Converged(LAYERS, above=0.0),
    notes=("Measured by `deepscale bench depth`: each training takes two whole steps in a process of its own whose memory is limited.",),
)  # fmt: skip
