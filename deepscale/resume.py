"""Going on with a run: from which checkpoint, with which settings, and what contradicts it."""

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepscale import checkpoints, config, paths
from deepscale.checkpoints import Checkpoint
from deepscale.config import AUTO, Config
from deepscale.data import Feeds
from deepscale.data.splits import DatasetInfo
from deepscale.errors import UsageError
from deepscale.files import atomic
from deepscale.progress import Progress
from deepscale.world import World

# How the network runs and where things lie: may differ from the stored run, whose results stay but for rounding.
FREE = {
    *("data_dir", "download", "workers", "engine", "zero", "offload", "deepspeed_config", "activations", "segment", "slots", "device", "kernel"),
    *("threads", "hang_timeout", "local_rank", "verbose", "tracking", "tags", "checkpoint_every", "checkpoint_dir", "resume", "keep", "async_save"),
    "pipeline_stages",
}
# Of these the present command's are taken, typed or not.
OWN = {"pipeline_stages", "local_rank", "verbose", "checkpoint_dir", "resume"}
BEGUN = "run.json"  # among the checkpoints of a run that has not finished
RESOLVED = ("threads", "workers")  # free ones that are measured or follow from the machine: kept on as many ranks, for the same rounding


@dataclass(frozen=True)
class Resumed:
    """A run that goes on: what was asked, with what may differ as it is asked now, and the same with every stored choice."""

    checkpoint: Checkpoint
    asked: Config
    settings: Config

    @property
    def run(self) -> dict[str, Any]:
        """What the run left of itself: `described`, store, run_id and pending."""
        return dict(self.checkpoint.progress["run"])


def with_folder(asked: Config, run_name: str) -> Config:
    """The settings with the folder that checkpoints go to: the one given, that of --resume PATH, or one by the run's name."""
    given = asked.checkpoint
    if given.checkpoint_dir is not None:
        return asked
    if given.resume not in ("auto", "never"):
        path = Path(given.resume)
        return asked.replace(checkpoint_dir=str(path.parent if path.name.startswith("step-") else path))
    if given.checkpoint_every is None and given.resume == "never":
        return asked
    return asked.replace(checkpoint_dir=str(Path("checkpoints") / paths.as_folder(run_name)))


def refuse_used(asked: Config) -> None:
    """Raises UsageError where a new run would write among another one's checkpoints."""
    folder = asked.checkpoint.checkpoint_dir
    if folder is not None and asked.checkpoint.resume == "never" and any(Path(folder).glob("step-*")):
        raise UsageError(f"{folder} holds checkpoints already: type --resume auto to go on with that run, or another --checkpoint-dir for a new one")


def find(asked: Config, typed: frozenset[str], place: World, screen: Progress) -> Resumed | None:
    """The run that --resume means, None for a new one. Every rank must ask. Raises UsageError where options contradict what is stored."""
    how, folder = asked.checkpoint.resume, asked.checkpoint.checkpoint_dir
    if how == "never":
        return None
    if how == "auto":
        assert folder is not None
        checkpoint = checkpoints.find(Path(folder), screen.warn, place)
        if checkpoint is None:
            screen.say(f"no checkpoint in {folder} yet: training starts from the beginning")
            return None
    else:
        checkpoint = checkpoints.open_checkpoint(Path(how), screen.warn, place)
    return merged(checkpoint, asked, typed, place.size)


def merged(checkpoint: Checkpoint, now: Config, typed: frozenset[str], ranks: int) -> Resumed:
    """The stored settings, with what may differ as it is typed now. Raises UsageError for other typed settings that differ, naming them."""
    before, chosen, given = checkpoint.manifest["asked"], checkpoint.manifest["settings"], config.flat(now)
    default = config.flat(Config())
    stored = {name: config.from_json(name, before[name]) if name in before else default[name] for name in given}
    resolved = {name: config.from_json(name, chosen[name]) if name in chosen else default[name] for name in given}
    other = [name for name in sorted(typed - FREE) if given[name] not in (stored[name], resolved[name], AUTO)]
    if other:
        was = " ".join(" ".join(config.typed(name, stored[name])) for name in other)
        is_now = " ".join(" ".join(config.typed(name, given[name])) for name in other)
        raise UsageError(
            f"the checkpoint {checkpoint.path} is of a run with {was}, and {is_now} was given; leave that out to go on with it, "
            f"or type --resume never and another --checkpoint-dir for a new run"
        )
    free = {name: given[name] if name in typed | OWN else stored[name] for name in FREE}
    same_ranks = checkpoint.progress["run"]["ranks"] == ranks
    measured = {name: resolved[name] for name in RESOLVED if same_ranks and name not in typed}
    return Resumed(checkpoint, now.replace(**stored | free), now.replace(**resolved | free | measured))


def refuse_other_data(resumed: Resumed, info: DatasetInfo) -> None:
    """Raises UsageError where the images are not those of the stored run."""
    if info.digest != resumed.run["digest"]:
        raise UsageError(
            f"the checkpoint {resumed.checkpoint.path} was trained on other images ({resumed.run['dataset']}, digest {resumed.run['digest'][:12]}) "
            f"than {info.label} from {info.location} (digest {info.digest[:12]}); give the --data-dir of that run"
        )


def begin(asked: Config, run_id: str | None, store: str | None) -> None:
    """Leaves beside the checkpoints which record this run has: what is killed before its first checkpoint goes on in it."""
    folder = asked.checkpoint.checkpoint_dir
    if folder is not None and run_id is not None:
        with suppress(OSError), atomic(Path(folder) / BEGUN) as temporary:
            temporary.write_text(json.dumps({"run_id": run_id, "store": store, "settings": _fixed(asked)}))


def begun(asked: Config, store: str | None) -> str | None:
    """MLflow's id of an earlier start of the same run that left no checkpoint; None where --resume auto was not typed or there is none."""
    folder = asked.checkpoint.checkpoint_dir
    if folder is not None and asked.checkpoint.resume == "auto":
        with suppress(OSError, ValueError, KeyError, TypeError):
            before = json.loads((Path(folder) / BEGUN).read_text())
            if (before["store"], before["settings"]) == (store, _fixed(asked)):
                return str(before["run_id"])
    return None


def finish(asked: Config) -> None:
    """The run has come to its end: a later one in its folder is another."""
    if asked.checkpoint.checkpoint_dir is not None:
        with suppress(OSError):
            (Path(asked.checkpoint.checkpoint_dir) / BEGUN).unlink()


def _fixed(asked: Config) -> dict[str, Any]:
    """What makes it the same run, as JSON gives it back."""
    settings: dict[str, Any] = json.loads(json.dumps({name: value for name, value in config.as_json(asked).items() if name not in FREE}))
    return settings


def described(name: str, folder: Path, feeds: Feeds, place: World) -> dict[str, Any]:
    """What a checkpoint says of its run, and `Resumed.run` gives back; the folder by its name in runs/."""
    info = feeds.info
    return {"name": name, "folder": folder.name, "dataset": info.label, "digest": info.digest, "feed": feeds.name, "ranks": place.size}


def folder_of(resumed: Resumed) -> Path:
    """The run's folder in `runs/` of the working folder. Raises UsageError for a name that leads elsewhere."""
    name = str(resumed.run["folder"])
    if not re.fullmatch(r"[A-Za-z0-9_.=-]+", name) or set(name) <= {"."}:
        raise UsageError(f"the checkpoint {resumed.checkpoint.path} names the folder {name!r}, which is none of a run")
    return Path("runs").absolute() / name
