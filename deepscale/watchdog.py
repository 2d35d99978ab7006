"""Ends a run in which one rank hangs, and names that rank, where the others would wait for it for ever.

Every rank says what it is doing (`Doing`, two assignments). A thread of each rank tells the others through the process group's key-value
store, and sees how far they are. When no rank has gone on for `--hang-timeout`, the one to blame is that whose thread is silent, too
(stopped, swapped out, its machine gone), else the one that has come least far: the others wait for it in a message to all.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from signal import SIGCONT
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]

from deepscale import rendezvous
from deepscale.progress import seconds
from deepscale.world import World

LONGEST_INTERVAL_S = 10.0
PREPARATION_S = 1800.0  # at least, before the first step: data are downloaded then, and ops built
CLOSE_S = 40.0  # to close the run's record in; the tracker's own patience is 30 s
EXIT_CODE = 1
ENDED, FAILED = "ended", "failed"  # a rank's last phase
KEY, OVER, CLOSED = (f"watchdog/{name}" for name in ("", "over", "closed"))


@dataclass
class Seen:
    """What is known of a rank: its last beat, and when, by this process's clock, it last beat and last went on."""

    heard: float
    moved: float
    beat: dict[str, Any] = field(default_factory=dict)

    def take(self, beat: dict[str, Any], now: float) -> None:
        """A beat of this rank, perhaps the same as before."""
        if beat["number"] != self.beat.get("number"):
            self.heard = now
        if beat["count"] != self.beat.get("count"):
            self.moved = now
        self.beat = beat

    @property
    def phase(self) -> str:
        """What the rank last said it was doing."""
        return str(self.beat.get("phase", "start"))


@contextmanager
def watch(world: World, timeout_s: float | None) -> Iterator[None]:
    """Watches the ranks while inside, where there are others and a timeout is given."""
    if world.size == 1 or timeout_s is None:
        yield
        return
    watchdog = Watchdog(world, timeout_s)
    try:
        yield
    except KeyboardInterrupt:  # all ranks end so, each in its own time
        watchdog.end(ENDED)
        raise
    except BaseException:
        watchdog.end(FAILED)
        raise
    watchdog.end(ENDED)


class Watchdog:
    """This rank's part of the watch: a thread, which ends the process when the run hangs."""

    def __init__(self, world: World, timeout_s: float) -> None:
        self.world, self.timeout_s, self.limit_s = world, timeout_s, max(timeout_s, PREPARATION_S)
        self.interval_s = min(LONGEST_INTERVAL_S, timeout_s / 10)
        self.main = threading.get_ident()
        self.store: Store | None = None
        self.number = 0
        now = time.monotonic()
        self.seen = [Seen(now, now) for _ in range(world.size)]
        self.reached = now  # when the store last answered
        self.over: list[int] | None = None  # whom another rank blames, that ends the run
        self.ended = threading.Event()
        self.talker = self._start(self._talk)
        self._start(self._judge)

    def end(self, how: str) -> None:
        """Leaves: the others no longer wait for a rank that has `ENDED`."""
        self.ended.set()
        self.talker.join(self.interval_s)
        if not self.talker.is_alive():
            with suppress(Exception):
                self._beat(how)

    @staticmethod
    def _start(work: Callable[..., object], *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=work, args=arguments, daemon=True, name="deepscale-watchdog")
        thread.start()
        return thread

    def _talk(self) -> None:
        """Beats and looks. Whatever the store raises whose process is stopped or gone, or for however long it does not answer."""
        while not self.ended.wait(self.interval_s):
            with suppress(Exception):
                self._beat(self.world.doing.phase)
                self._look()
                self.reached = time.monotonic()

    def _judge(self) -> None:
        own, last = self.world.rank, time.monotonic()
        while not self.ended.wait(self.interval_s):
            now = time.monotonic()
            asleep, last = now - last > self.limit_s, now  # this process was stopped, and the others have given it up
            begun = max(seen.beat.get("step", 0) for seen in self.seen) > 1  # a second step needs all ranks' first
            self.limit_s = self.timeout_s if begun else max(self.timeout_s, PREPARATION_S)
            found = [own] if asleep else self.over
            if found is None:
                found = blame(self.seen, own, now, self.limit_s, now - self.reached < self.limit_s / 2)
            if found is not None and not self.ended.is_set():
                self._stop(found)

    def _beat(self, phase: str) -> None:
        self.number += 1
        doing = self.world.doing
        beat = {"number": self.number, "count": doing.count, "step": doing.step, "phase": phase, "line": self._line()}
        beat |= {"host": socket.gethostname(), "pid": os.getpid(), "born": born(os.getpid())}
        self.seen[self.world.rank].take(beat, time.monotonic())
        self._connected().set(f"{KEY}{self.world.rank}", json.dumps(beat))

    def _look(self) -> None:
        store = self._connected()
        known = [rank for rank, seen in enumerate(self.seen) if seen.beat or store.check([f"{KEY}{rank}"])]
        texts = store.multi_get([f"{KEY}{rank}" for rank in known])
        for rank, text in zip(known, texts, strict=True):
            self.seen[rank].take(json.loads(text), time.monotonic())
        if store.check([OVER]):
            self.over = json.loads(store.get(OVER))

    def _connected(self) -> Store:
        if self.store is None:
            self.store = rendezvous.connect(timedelta(seconds=5.0 + self.interval_s))
        return self.store

    def _line(self) -> str:
        """The line that the main thread is in: "tensors.py:88"."""
        frame = sys._current_frames().get(self.main)
        return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "?"

    def _stop(self, blamed: list[int]) -> None:
        """Ends this process. One rank says why; rank 0 closes the record, if it can, and the others give it the time."""
        now = time.monotonic()
        silent = [rank for rank in blamed if is_silent(self.seen[rank], now, self.limit_s)]
        text = sentence(self.seen, blamed, silent, now, self.limit_s)
        self._within(2.0, lambda: self._connected().set(OVER, json.dumps(blamed)))
        if self.world.rank == min(set(range(self.world.size)) - set(blamed), default=0):
            print(f"deepscale: {text}", file=sys.stderr, flush=True)
        if self.world.is_main:
            self._within(CLOSE_S, lambda: (self.world.doing.close or str)(text))
            self._within(2.0, lambda: self._connected().set(CLOSED, ""))
            time.sleep(1.0)  # the store ends with this process: a moment for the others to see it
        elif 0 not in silent:
            self._within(CLOSE_S, lambda: self._connected().wait([CLOSED], timedelta(seconds=CLOSE_S)))
        self._wake(silent)
        os._exit(EXIT_CODE)

    def _within(self, limit_s: float, action: Callable[[], object]) -> None:
        def attempt() -> None:
            with suppress(Exception):
                action()

        self._start(attempt).join(limit_s)

    def _wake(self, ranks: Sequence[int]) -> None:
        """Lets stopped processes of this machine go on, to find that the run is over: no signal but SIGKILL ends a stopped process."""
        for beat in (self.seen[rank].beat for rank in ranks if self.seen[rank].beat):
            if beat["host"] == socket.gethostname() and beat["born"] is not None and beat["born"] == born(beat["pid"]):
                with suppress(OSError):
                    os.kill(beat["pid"], SIGCONT)


def is_silent(seen: Seen, now: float, timeout_s: float) -> bool:
    """Whether a rank's thread is not heard of, which beats several times in this time."""
    return now - seen.heard > timeout_s / 2


def blame(ranks: Sequence[Seen], own: int, now: float, timeout_s: float, reached: bool) -> list[int] | None:
    """The ranks that the others wait for, none if all wait at the same place; or None while somebody goes on, or all others have ended.

    `reached` says whether this rank still reaches the key-value store, which lives with rank 0.
    """
    active = [rank for rank, seen in enumerate(ranks) if seen.phase != ENDED]
    if own not in active or len(active) == 1 or now - max(ranks[rank].moved for rank in active) < timeout_s:
        return None
    failed = [rank for rank in active if ranks[rank].phase == FAILED]
    silent = [rank for rank in active if rank != own and is_silent(ranks[rank], now, timeout_s)]
    if failed or silent:
        return failed or ([0] if not reached and own != 0 else silent)
    least, most = (f(int(ranks[rank].beat["count"]) for rank in active) for f in (min, max))
    return [rank for rank in active if ranks[rank].beat["count"] == least] if least < most else []


def sentence(ranks: Sequence[Seen], blamed: Sequence[int], silent: Sequence[int], now: float, timeout_s: float) -> str:
    """Who is blamed, where they are, since when, doing what, and what to type."""
    parts = []
    for rank in blamed:
        seen = ranks[rank]
        name = f"rank {rank} (process {seen.beat['pid']} on {seen.beat['host']})" if seen.beat else f"rank {rank}"
        doing = f"{seen.phase} of step {seen.beat.get('step', 0):,}"
        if seen.phase == FAILED:
            parts.append(f"{name} has failed, and the other ranks wait for it")
        elif rank in silent:
            when = f"not been heard of for {seconds(now - seen.heard)}, since the {doing}"
            parts.append(f"{name} has {when}: its process is stopped, or its machine gone or out of memory")
        else:
            parts.append(f"{name} has been at the {doing} for {seconds(now - seen.moved)}, in {seen.beat['line']}, and the other ranks wait for it")
    if not blamed:
        first = ranks[0]
        lines = ", ".join(f"rank {rank} in {seen.beat.get('line')}" for rank, seen in enumerate(ranks[:8]))
        parts.append(
            f"no rank has gone on for {seconds(now - first.moved)}: all are at the {first.phase} of step {first.beat.get('step', 0):,}, {lines}"
        )
    record = "; rank 0 keeps the run's record, which may stay open" if 0 in silent else ""
    advice = (
        f"Type the same with --resume auto to go on from the last checkpoint; or, if it takes so long, a --hang-timeout above {seconds(timeout_s)}"
    )
    return f"{'; '.join(parts)}{record}. {advice}"


def born(process: int) -> str | None:
    """When a process was started, in ticks of this machine's clock: tells it from another that got its number. None where that is not known."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def age_s() -> float | None:
    """Seconds since this process was started, before Python was there; None where that is not known."""
    ticks = born(os.getpid())
    if ticks is None:
        return None
    return float(Path("/proc/uptime").read_text().split()[0]) - int(ticks) / os.sysconf("SC_CLK_TCK")
