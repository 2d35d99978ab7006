"""`deepspeed deepscale/train.py --depth N`: one training run, from the command line to the summary."""

import dataclasses
import json
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepscale import (
    activations,
    checkpoints,
    config,
    errors,
    kernel,
    loop,
    memory,
    ops,
    outcome,
    paths,
    plan,
    plan_pipeline,
    progress,
    provenance,
    resume,
    stop,
    tracking,
    tracking_lines,
    tracking_store,
    watchdog,
    world,
)
from deepscale.config import Config
from deepscale.data import Feeds, open_feeds
from deepscale.data.sources import load_source
from deepscale.data.splits import DatasetInfo
from deepscale.engine import Engine, build_engine, hush, preload
from deepscale.engine_config import stage_and_offload
from deepscale.engine_pipeline import materialise
from deepscale.folder_lock import locked
from deepscale.machine import measure_machine
from deepscale.models import freezing, registry
from deepscale.models.convnext import use_kernel
from deepscale.models.initial import seed_of
from deepscale.models.network import Network
from deepscale.nvme import folder
from deepscale.nvme.ready import ready
from deepscale.plan_memory import memories_of
from deepscale.plan_network import EVALUATION_BATCH
from deepscale.records import Records
from deepscale.resume import Resumed
from deepscale.saving import Saving
from deepscale.tracking import Tracker

NAMES = ("experiment", "run_name", "tags", "checkpoint_dir")  # settings that MLflow has as something else than a parameter
LEAVE_S, LOST_S = 60.0, 2.0  # for a checkpoint that is being written when the run ends, and when a rank is gone


@errors.command
def main(arguments: Sequence[str] | None = None) -> None:
    """Trains as the command line says."""
    asked_to_end = stop.Stop()
    asked_to_end.listen()
    settings, typed = config.parse_typed(arguments)
    settings = resume.with_folder(settings, settings.tracking.run_name or run_name(settings, but=resume.FREE))
    hush(settings.engine.verbose)
    resume.refuse_used(settings)
    checkpoints.check_writable(settings.checkpoint.checkpoint_dir)
    place = world.join(settings.engine)
    loading = tracking.preload() if settings.tracking.tracking and place.is_main else None
    try:
        with (
            watchdog.watch(place, settings.engine.hang_timeout),
            locked(settings.checkpoint.checkpoint_dir, place),
            progress.Progress(0, enabled=place.is_main) as screen,
        ):
            resumed = resume.find(settings, typed, place, screen)
            if resumed is not None and resumed.checkpoint.progress["finished"]:
                screen.say(
                    f"the run in {resumed.checkpoint.path.parent} has ended after its {resumed.checkpoint.step:,} steps: nothing is left to train"
                )
                return
            if resumed is None:
                checkpoints.check_there(settings.checkpoint.init_from)
            prepared = prepare(settings, place, screen, loading, resumed)
            preload(prepared.plan.config)
            rows, view = train(prepared, screen, asked_to_end)
        if place.is_main:
            progress.show_summary(rows | ({"show": view} if view else {}), "summary")
    except errors.Interrupted:
        if asked_to_end.deferred:  # all ranks end here, and the launcher ends the others 30 s after the first: they wait for rank 0's closing
            place.agree(None)
        raise
    finally:
        world.leave()


@dataclass(frozen=True)
class Prepared:
    """A run before its network exists: what was asked, the plan, and the images."""

    asked: Config
    plan: plan.Plan
    place: world.World
    feeds: Feeds
    cpu_adam: bool
    resumed: Resumed | None = None


def prepare(
    asked: Config, place: world.World, screen: progress.Progress, loading: threading.Thread | None = None, resumed: Resumed | None = None
) -> Prepared:
    """Images, ops and plan, said on screen. Raises UsageError for what is not possible.

    `loading` imports packages meanwhile; it has ended before anything is timed, and before the network's memory is counted.
    With `resumed` the settings are those, and what is left to plan is how they run here.
    """
    asked, recorded = (asked, asked) if resumed is None else (resumed.settings, resumed.asked)
    _, offload = stage_and_offload(asked)  # a contradiction is refused before data are read or ops are built
    if offload == "nvme" and asked.engine.engine == "deepspeed":
        folder.check(asked.engine.nvme_path)
    source = load_source(asked.data, screen.say)
    info = source.info
    if resumed is not None:
        resume.refuse_other_data(resumed, info)
    cpu_adam = _prepare_ops(asked, offload, screen)
    chosen = kernel.choose(asked, place, screen.say, screen.warn)
    if loading is not None:
        loading.join()
    machine = measure_machine(place)
    planned = plan.resolve(chosen, place, machine, channels=info.channels, image_size=info.image_size, classes=info.classes)
    settings = planned.config
    torch.set_num_threads(int(settings.engine.threads))
    screen.say(f"asked for {recorded.model.depth:,} layers on {info.label}, seed {settings.recipe.seed}")
    for note in planned.notes:
        screen.say(note)
    if offload == "nvme":
        ready(settings, place, cpu_adam, planned.memory.states.disk, planned.memory.parameters, screen.say)
    feeds = open_feeds(
        source,
        settings.data,
        micro_batch=int(settings.data.batch_size) // settings.recipe.accumulation // place.data_size,
        eval_batch=EVALUATION_BATCH,
        seed=settings.recipe.seed,
        rank=place.data_rank,
        world_size=place.data_size,
        device=place.device,
        workers=int(settings.data.workers),
        say=screen.say,
    )
    screen.say(f"images fed by {feeds.name}" + (f" ({feeds.why})" if feeds.why else ""))
    if resumed is not None and feeds.name != resumed.run["feed"]:
        screen.warn(f"images were fed by {resumed.run['feed']} so far: the order stays, what augmentation draws does not")
    return Prepared(recorded, planned, place, feeds, cpu_adam, resumed)


def train(run: Prepared, screen: progress.Progress, asked_to_end: stop.Stop) -> tuple[dict[str, str], str]:
    """Model, engine, steps, summary: (the summary's rows, the command that shows the run). Closes its record whatever happens."""
    settings, place, info, resumed = run.plan.config, run.place, run.feeds.info, run.resumed
    name = str(resumed.run["name"]) if resumed else settings.tracking.run_name or run_name(run.asked)
    folder = resume.folder_of(resumed) if resumed else paths.run_folder(name)
    parameters = described(run.asked, settings, run.plan, run.feeds, place)
    store = tracking_store.shown(tracking_store.store_uri()) if settings.tracking.tracking else None
    base = memory.reset_peak(place.device)
    with recorded(run, name, folder, parameters, store, screen) as record:
        place.doing.close = record.close_failed
        model = build_model(settings, info, place)
        begin_with(model, settings, resumed, screen)
        engine = build_engine(model, settings, place, run.cpu_adam)
        memory.give_back()  # ZeRO has copied the network's own tensors
        tracker = record.tracker
        if place.is_main:
            resume.begin(run.asked, tracker.run_id, store)
        tracker.text("deepspeed.json", json.dumps(engine.settings, indent=2))
        records = Records(model, engine, settings, tracker, screen)
        saving = build_saving(run, model, engine, screen, lambda: about_run(run, name, folder, tracker) | {"store": store})
        fit = loop.Fit(loop.Run(settings, place, model, engine, run.feeds, tracker, screen, records, asked_to_end, saving))
        if resumed is not None:
            go_on(fit, resumed, store)
        started = watchdog.age_s()
        try:
            result = fit()
        finally:  # also of a run that stopped: there they are wanted most
            flow_rows = records.keep(folder, name, parameters) if place.is_main else {}
            if saving is not None:  # a rank that is gone writes no part of it any more
                saving.saver.leave(LOST_S if outcome.is_lost_rank(sys.exc_info()[1]) else LEAVE_S)
        if settings.checkpoint.checkpoint_dir:
            state = checkpoints.gathered_state(model, engine)
            if place.is_main:
                checkpoints.save(Path(settings.checkpoint.checkpoint_dir), state, settings, info, fit.eval_limit)
        peak = memory.peak_bytes(place.device)
        rows = summary(settings, run.plan, info, result, peak, base) | flow_rows
        rows |= {"start": f"{progress.seconds(started)} from the process's start to the first step"} if started is not None else {}
        if place.stages > 1:
            rows |= stage_rows(run.plan, info, place, place.gather(max(0, peak - base)))
        memory_metrics = {"perf/peak_memory_bytes": peak, "perf/peak_memory_over_start_bytes": max(0, peak - base)}
        tracker.log(memory_metrics | {"perf/seconds": result.seconds} | ({"perf/start_s": started} if started is not None else {}), result.steps)
        tracker.text("summary.json", json.dumps(rows, indent=2))
    if saving is not None:  # after the record is closed: what says that nothing is left to do must be the last that is done
        if saving.marks:
            saving.save(result.steps, result.validation["accuracy"], finished=True)
        saving.saver.close()
    if place.is_main:
        resume.finish(run.asked)
    return rows, tracker.view_command()


def recorded(run: Prepared, name: str, folder: Path, parameters: dict[str, Any], store: str | None, screen: progress.Progress) -> outcome.Recorded:
    """The run's record, which is opened when it is first asked for."""
    settings, place, info = run.plan.config, run.place, run.feeds.info
    tags = {"dataset": info.name, "feed": run.feeds.name, "engine": settings.engine.engine}
    tags |= {"checkpoint_dir": settings.checkpoint.checkpoint_dir} if settings.checkpoint.checkpoint_dir else {}
    tags |= {"hardware": json.dumps(provenance.hardware()), "versions": json.dumps(provenance.versions())}
    tags |= dict(tag.split("=", 1) for tag in settings.tracking.tags or ())

    def opened() -> Tracker:
        tracker = tracking.open_tracker(
            settings.tracking,
            run_name=name,
            parameters=parameters,
            tags=tags,
            dataset=info,
            rank=place.rank,
            warn=screen.warn,
            folder=folder,
            run_id=run.resumed.run["run_id"] if run.resumed else resume.begun(run.asked, store),
        )
        return tracking_lines.told(tracker, place)

    return outcome.Recorded(opened, lambda error: exhausted(run, error, memory.peak_bytes(place.device)), place)


def go_on(fit: loop.Fit, resumed: Resumed, store: str | None) -> None:
    """Takes a run up where its checkpoint has left it. store: the one that it is recorded in from here on."""
    run = fit.run
    checkpoints.restore(resumed.checkpoint, run.model, run.engine, run.world, run.progress.say)
    fit.load(resumed.checkpoint.progress, resumed.checkpoint.arrays())
    run.tracker.again(resumed.run.get("pending", []))
    if store != resumed.run["store"]:
        run.progress.say(f"the run has been recorded in {resumed.run['store'] or 'no store'} so far, and is in {store or 'none'} from here on")
    run.progress.say(f"going on after step {fit.step:,}, from {resumed.checkpoint.path}")


def about_run(run: Prepared, name: str, folder: Path, tracker: Tracker) -> dict[str, Any]:
    """What the run wants to find again in a checkpoint."""
    return {**resume.described(name, folder, run.feeds, run.place), "run_id": tracker.run_id, "pending": tracker.pending()}


def build_saving(run: Prepared, model: Network, engine: Engine, screen: progress.Progress, about: Callable[[], dict[str, Any]]) -> Saving | None:
    """What saves the run, None without a folder for it; `about` is what the run wants to find again."""
    asked = run.plan.config.checkpoint
    if asked.checkpoint_dir is None:
        return None
    folder = Path(asked.checkpoint_dir)
    saver = checkpoints.Saver(
        folder, model, engine, run.place, about=checkpoints.about(run.asked, run.plan.config, run.feeds.info), keep=asked.keep,
        asynchronous=None if asked.async_save == config.AUTO else asked.async_save, say=screen.say, warn=screen.warn,
    )  # fmt: skip
    saving = Saving(saver, folder, asked.checkpoint_every, asked.checkpoint_every is not None or asked.resume != "never", about)
    if run.resumed is not None:
        saving.saved_step, saving.best = run.resumed.checkpoint.step, run.resumed.checkpoint.progress["best"]
    return saving


def exhausted(run: Prepared, error: BaseException, peak: int) -> str:
    """The sentence for memory that ran out: what was planned, what was in use, and what to switch on."""
    planned, advice = run.plan.memory.total, outcome.memory_advice(run.plan.config, run.place.size)
    asked = (str(error).splitlines() or [type(error).__name__])[0]
    used = f"planned {progress.gib(planned)} over the start, at most {progress.gib(peak)} were in use in all"
    return f"out of memory on {run.place.device}: {used} ({asked}); {advice}"


def build_model(settings: Config, info: DatasetInfo, place: world.World) -> Network:
    """The planned network with its initial values, on the run's device."""
    # A GPU's parameters are filled where they are: the host may have less memory, and needs none. Those of other stages are nowhere.
    with place.device if place.stages == 1 else torch.device("meta"):
        model = registry.build(settings.model, registry.Images(info.channels, info.image_size, info.classes), settings.engine.stack_size)
    if place.stages > 1:
        edges = plan_pipeline.edges_of(settings, place.size, channels=info.channels, image_size=info.image_size, classes=info.classes)
        materialise(model, edges[place.stage], edges[place.stage + 1], place.device)
    activations.policy_of(settings).apply(model)
    use_kernel(model, settings.engine.kernel)
    torch.manual_seed(seed_of(settings.recipe.seed, f"rank {place.rank}"))  # of stochastic depth
    return model.initialise(settings.recipe.seed)


def begin_with(model: Network, settings: Config, resumed: Resumed | None, screen: progress.Progress) -> None:
    """The weights that --init-from names, which a resumed run has from its checkpoint, and the layers that are to stay as they are."""
    given = settings.checkpoint
    if given.init_from is not None and resumed is None:
        checkpoints.start_from(Path(given.init_from), model, given.init_layers, screen.say)
    freezing.freeze(model, settings.recipe.freeze)


def _prepare_ops(asked: Config, offload: str, screen: progress.Progress) -> bool:
    """Builds DeepSpeed's CPU optimiser where offload may need it; whether it is there."""
    if asked.engine.engine != "deepspeed":
        return False
    if offload not in ("cpu", "nvme") and not (offload == config.AUTO and torch.cuda.is_available()):
        return False
    reason = ops.ensure_ops(["cpu_adam"], screen.say, asked.engine.verbose)["cpu_adam"]
    if reason is not None:
        screen.warn(f"{reason}; an offloaded optimiser is stepped by torch's AdamW instead")
    return reason is None


def described(asked: Config, settings: Config, planned: plan.Plan, feeds: Feeds, place: world.World) -> dict[str, Any]:
    """All settings with every `auto` resolved, and what was asked where it differs; but not what differs by name alone when runs are compared."""
    own = settings.model
    hidden = registry.unknown(own.model) if own.model != "convnext" else ()  # what another network does not know is left out
    values = {name: value for name, value in config.flat(settings).items() if name not in NAMES and name not in hidden}
    before = config.flat(asked)
    values |= {f"asked_{name}": before[name] for name in values if before[name] != values[name] and before[name] != config.AUTO}
    values["resolved_auto"] = ",".join(name for name in values if before.get(name) == config.AUTO)
    return values | {
        "built_depth": own.built_depth,
        "parameters": planned.memory.parameters,
        "planned_memory_bytes": int(planned.memory.total),
        "resolved_dataset": feeds.info.name,
        "resolved_feed": feeds.name,
        "ranks": place.size,
        "torch": torch.__version__,
    }


def run_name(asked: Config, but: Collection[str] = ()) -> str:
    """A name from the depth and what was chosen by hand, `but` some settings."""
    hidden = {"model", "depth", "blocks", "local_rank", "data_dir", "run_name", "experiment", "tags", "time_budget", "max_steps", "verbose", *but}
    hidden |= {"hang_timeout", "download"} | {f.name for f in dataclasses.fields(config.CheckpointConfig)}
    parts = [f"{name}={tracking.as_text(value)}" for name, value in config.differing(asked).items() if name not in hidden]
    return " ".join([f"{asked.model.model}-{asked.model.built_depth}", *parts])


def summary(settings: Config, planned: plan.Plan, info: DatasetInfo, result: loop.Result, peak: int, base: int) -> dict[str, str]:
    """The rows of the final table."""
    grown, expected = max(0, peak - base), planned.memory.total + planned.copy
    return {
        "depth": f"{settings.model.built_depth:,} layers ({registry.MODELS[settings.model.model].shape(settings.model)})",
        "parameters": f"{planned.memory.parameters:,}",
        "data": f"{info.label}, {info.train_images:,} / {info.validation_images:,} / {info.test_images:,} images",
        "steps": f"{result.steps:,} in {progress.seconds(result.seconds)}, {result.step_s:.3g} s each",
        "throughput": f"{progress.rate(result.images_per_s)} images/s",
        "loss": f"{result.first_loss:.4f} -> {result.loss:.4f}",
        "validation": f"{result.validation['accuracy']:.2%} of {result.validation['images']:,.0f} images, loss {result.validation['loss']:.4f}",
        "test": f"{result.test['accuracy']:.2%} of {result.test['images']:,.0f} images, loss {result.test['loss']:.4f}",
        "first layer": "frozen" if settings.recipe.freeze else f"mean |gradient| {result.first_gradient:.3g} -> {result.gradient:.3g}",
        "peak memory": f"{progress.gib(peak)}, {progress.gib(grown)} over the start, where {progress.gib(expected)} were planned",
    }


def stage_rows(planned: plan.Plan, info: DatasetInfo, place: world.World, grown: Sequence[int]) -> dict[str, str]:
    """The rows of a pipeline's stages; `grown`: bytes over the start, of each rank."""
    memories = memories_of(planned.config, place.size, info.channels, info.image_size, info.classes)
    copies = [plan.COPIED * memory.parameters // place.data_size if planned.copy else 0 for memory in memories]
    peaks = [max(grown[i * place.data_size : (i + 1) * place.data_size]) for i in range(place.stages)]
    found = ((memory.parameters, memory.total + copy, peak) for memory, copy, peak in zip(memories, copies, peaks, strict=True))
    return {
        f"stage {i}": f"{parameters:,} parameters, peak {progress.gib(peak)} over the start, where {progress.gib(expected)} were planned"
        for i, (parameters, expected, peak) in enumerate(found, 1)
    }


if __name__ == "__main__":
    stop.program(main)
