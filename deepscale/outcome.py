"""How a run ended, in one word for its record, and what to switch on where the memory ran out."""

import errno
import functools
from collections.abc import Callable
from types import TracebackType

import torch

from deepscale import last_words
from deepscale.config import IN_SEGMENTS, Config
from deepscale.errors import DeepscaleError, LostRankError, NonFiniteError, OutOfMemoryError
from deepscale.last_words import Words
from deepscale.models.convnext import smallest_segment
from deepscale.tracking import Tracker
from deepscale.world import World

FINISHED, INTERRUPTED, NON_FINITE, OUT_OF_MEMORY, FAILED = "finished", "interrupted", "non_finite", "out_of_memory", "failed"
STATUS = {FINISHED: "FINISHED", INTERRUPTED: "KILLED"}  # MLflow's word; FAILED for the rest
# torch's allocators on the host raise a plain RuntimeError with these words (c10/core/impl/alloc_cpu.cpp, pinned memory, C++'s own).
REFUSED_BY_HOST = ("can't allocate memory", "Cannot allocate memory", "std::bad_alloc", "CUDA error: out of memory")


def outcome_of(error: BaseException | None) -> str:
    """The word for a run that ended with this error, or with none."""
    if error is None:
        return FINISHED
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, NonFiniteError):
        return NON_FINITE
    return OUT_OF_MEMORY if is_out_of_memory(error) else FAILED


def is_out_of_memory(error: BaseException) -> bool:
    """Whether device or host refused to give memory. A process that the system kills for its memory cannot be asked."""
    if isinstance(error, (OutOfMemoryError, MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error) for words in REFUSED_BY_HOST)


def is_lost_rank(error: BaseException | None) -> bool:
    """Whether a message between ranks failed because one of them is gone: gloo raises a plain RuntimeError that names its source file."""
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


class Recorded:
    """A run's record, which `open` makes when it is first asked for; closed with the run's outcome, whatever happens inside `with`.

    Bad input that is found before leaves no record. Memory that runs out always leaves one, and is raised as OutOfMemoryError with
    what `sentence` makes of the error; so does another rank that is gone, as LostRankError. Rank 0 says and records what ended another
    rank first, if that could tell.
    """

    def __init__(self, open: Callable[[], Tracker], sentence: Callable[[BaseException], str], place: World) -> None:
        self.open, self.sentence, self.place = open, sentence, place

    @functools.cached_property
    def tracker(self) -> Tracker:
        """The tracker, open from now on."""
        return self.open()

    def close_failed(self, text: str) -> None:
        """Closes the record, if there is one, of a run that ends outside this thread."""
        if "tracker" in vars(self):
            self.tracker.tags({"outcome": FAILED, "outcome_text": text})
            self.tracker.finish("FAILED")

    def __enter__(self) -> "Recorded":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        word = outcome_of(error)
        failure: DeepscaleError | None = None
        if error is not None and word == OUT_OF_MEMORY:
            failure = OutOfMemoryError(self.sentence(error))
        elif error is not None and (is_lost_rank(error) or word == INTERRUPTED):
            words = last_words.read(self.place) if self.place.is_main else None
            if words is not None:
                word, failure = words.outcome, _failure_of(words)
            elif word != INTERRUPTED:
                failure = LostRankError()
        if word not in (FINISHED, INTERRUPTED) and not isinstance(failure, LostRankError):
            told = last_words.leave(self.place, word, str(failure or f"{type(error).__name__}: {error}"))
            if failure is not None:
                failure.told = told
        if failure is not None or "tracker" in vars(self):
            self.tracker.tags({"outcome": word} | ({"outcome_text": str(failure)} if failure else {}))
            self.tracker.finish(STATUS.get(word, "FAILED"))
        if failure is not None:
            raise failure from None


def _failure_of(words: Words) -> DeepscaleError:
    """The error of rank 0 for that of another rank."""
    if words.outcome == OUT_OF_MEMORY:
        return OutOfMemoryError(f"rank {words.rank} is {words.text}")
    return LostRankError(f"rank {words.rank} has ended: {words.text}")


def memory_advice(settings: Config, ranks: int) -> str:
    """What to type for a smaller run: everything that is not switched on yet, what costs least first."""
    engine, micro = settings.engine, int(settings.data.batch_size) // settings.recipe.accumulation // ranks
    stacked = settings.model.model == "convnext"
    least = smallest_segment(settings.model.stage_blocks) if stacked else None
    advice = []
    if not stacked:
        pass  # it has neither stacks to recompute nor a width that may change
    elif settings.model.skip == "reversible":
        advice += ["--activations reconstruct"] if engine.activations != "reconstruct" else []
    elif engine.activations not in IN_SEGMENTS:
        advice.append("--recompute")
    elif engine.segment != least:
        advice.append(f"--segment {least}")
    elif engine.activations == "recompute":
        advice += ["--activations offload"] if engine.device == "cuda" else []
        advice.append("--activations revolve")
    if engine.engine == "deepspeed" and ranks > 1 and engine.zero != 3:
        advice.append("--zero 3")
    if engine.engine == "deepspeed" and engine.device == "cuda" and engine.offload == "none":
        advice.append("--zero 3 --offload cpu" if ranks == 1 else "--offload cpu")
    if micro > 1:
        advice.append(f"--accumulation {2 * settings.recipe.accumulation}")
    if stacked and int(settings.model.width) > 1:
        advice.append(f"--width {int(settings.model.width) // 2}")
    return f"type {' or '.join(advice)}" if advice else "type a smaller --depth"
