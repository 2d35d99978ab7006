"""`deepscale bench checkpoint`: what saving, and resuming from, a deep network costs beside writing as many bytes."""

from deepscale.bench.options import Options, say, settings_of
from deepscale.bench.report import Goal, Row, ratio
from deepscale.bench.worker import run_worker
from deepscale.depth import blocks_for_depth, depth_of_blocks

GOAL_SAVE = Goal(3.0)
GOAL_STALL = Goal(1.0)


def main(arguments: list[str]) -> None:
    """Measures in one fresh process, whose files lie in the working folder. Raises BenchError where it fails."""
    options = Options("checkpoint", "A checkpoint of a deep network: saved, saved while training goes on, verified, restored.")
    options.depth("depth", 10_001, "layers of the network")
    options.size("width", 8, "channels of stage 1")
    options.size("batch-size", 8, "images of the one step before")
    options.size("zero", 2, "ZeRO stage", low=0)
    options.size("rounds", 5, "saves of each kind, in turn")
    options.size("threads", 1, "threads")
    options.time_limit()
    values, report = options.parse(arguments)
    layers = f"{depth_of_blocks(blocks_for_depth(values.depth)):,} layers"
    say(f"checkpoints of {layers}, {values.rounds} rounds")
    sizes = settings_of(values, "depth", "width", "batch_size", "zero", "rounds", "threads")
    found = run_worker("deepscale.bench.saved", sizes, threads=values.threads, limit_s=values.time_limit)
    raw, mb = found["raw"], found["bytes"] / 1e6
    report.rows = [
        ratio(f"saving {layers} / writing and syncing as many bytes", found["save"], raw, GOAL_SAVE),
        ratio("training waits for an asynchronous save / for a copy of the states in host memory", found["stall"], found["copy"], GOAL_STALL),
        Row(f"writing and syncing {mb:,.0f} MB", "s", tuple(raw)),
        Row("saving: writing, hashing, syncing, reading back", "s", tuple(found["save"])),
        Row("training waits for an asynchronous save", "s", tuple(found["stall"])),
        Row("copy of the states in host memory", "s", tuple(found["copy"])),
        Row("writing behind the training", "s", tuple(found["behind"])),
        Row("finding and verifying", "s", tuple(found["verify"])),
        Row("restoring", "s", tuple(found["restore"])),
    ]
    report.notes.append(f"{found['bytes']:,} bytes, {found['bytes'] / found['parameters']:.2f} for each of {found['parameters']:,} parameters")
    report.publish(values.json)
