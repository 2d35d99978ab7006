"""`make soak`: runs that are killed at random until they have finished, and what that has cost them.

Every kind of run (plain torch and ZeRO 0 to 3, on one rank and on two) trains a tiny network with a checkpoint every few steps. One of its
processes, or all, get SIGKILL, SIGTERM or SIGUSR1 at the start, in a step, while a checkpoint is written, in an evaluation or at the end; it is
started again with --resume auto, and so on until its share of kills is done and it may finish. After each kill: the others end by themselves and
no process is left; an intact checkpoint is there, no older than the newest one before the kill, and none is damaged. At the end every value of
the loss and accuracy curves in MLflow equals that of the same run without kills, bit for bit.

Writes a row per kill and per finished run to docs/results/soak.json as they come. Starts by fork (warm.py): 100 kills take some minutes.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs import Server, Started

from deepscale import checkpoints, tracking_store
from deepscale.files import atomic

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS, EVERY = 60, 5
RUN = [
    "--dataset", "synthetic", "--feed", "tensors", "--depth", "14", "--width", "4", "--patch-size", "4", "--batch-size", "16", "--threads", "1",
    "--device", "cpu", "--kernel", "torch", "--layerscale-init", "1", "--drop-path", "0.1", "--eval-images", "100", "--eval-every", "7",
    "--max-steps", str(STEPS), "--checkpoint-every", f"{EVERY}steps", "--checkpoint-dir", "ck", "--resume", "auto", "--hang-timeout", "60s",
]  # fmt: skip
ENGINES = {"torch": ["--engine", "torch"], **{f"ZeRO {stage}": ["--zero", str(stage)] for stage in range(4)}}
AIMS = ("start", "step", "checkpoint", "evaluation", "end")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)
CURVES = ("train/loss", "train/accuracy", "train/lr", "val/loss", "val/accuracy", "test/loss", "test/accuracy")
LAUNCHER_S = 5.0  # a launcher's patience is 30 s
END_S = 90.0  # for the processes that were not killed to end in
Curves = dict[str, dict[int, float]]


def reached(started: Started, aim: str) -> bool:
    """Whether rank 0 is where the kill is aimed at."""
    step, phase = started.at()
    return step == STEPS and phase == "evaluation" if aim == "end" else phase == aim


def saved(folder: Path) -> int:
    """The step of the newest checkpoint that is in place, 0 for none."""
    return max((int(path.name.removeprefix("step-")) for path in (folder / "ck").glob("step-*")), default=0)


def curves(folder: Path) -> Curves:
    """The curves of the newest run in a folder's database: step -> value. One that was killed before its first checkpoint is begun anew."""
    tracking_store.import_mlflow()
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    run = client.search_runs(experiments, order_by=["attributes.start_time DESC"])[0]
    return {name: {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)} for name in CURVES}


class Kind:
    """One kind of run: its ranks and engine, the curves of the run without kills, and how long that took."""

    def __init__(self, server: Server, work: Path, store: Path, ranks: int, engine: str, dice: random.Random) -> None:
        self.server, self.work, self.store, self.ranks, self.engine, self.dice = server, work, store, ranks, engine, dice
        self.arguments = [*RUN, *ENGINES[engine]]
        folder = self._folder()
        whole = Started(server, folder, self.arguments, ranks)
        assert whole.wait(600) and whole.codes() == [0] * ranks, whole.log.read_text()
        self.seconds, self.expected = time.monotonic() - whole.begin, curves(folder)
        assert list(self.expected["train/loss"]) == list(range(1, STEPS + 1))

    def _folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(dir=self.work))
        shutil.copy(self.store, folder / "mlflow.db")
        return folder

    def rows(self, kills: int) -> Iterator[dict[str, Any]]:
        """A row per kill, and one per finished run."""
        done, folder, in_run = 0, self._folder(), 0
        while True:
            row = self._start(folder, kill=done < kills)
            hit = row["event"] == "kill"
            done, in_run = done + hit, in_run + hit
            finished = row.pop("finished")
            if hit:
                yield {"kill": done, **row}
            if finished:
                found = curves(folder)
                wrong = [name for name in CURVES if found[name] != self.expected[name]]
                yield {**self._named("finished"), "kills": in_run, "ok": not wrong and not row["problems"], "problems": row["problems"] + wrong}
                shutil.rmtree(folder)
                if done >= kills:
                    return
                folder, in_run = self._folder(), 0

    def _named(self, event: str) -> dict[str, Any]:
        return {"event": event, "ranks": self.ranks, "engine": self.engine}

    def _start(self, folder: Path, kill: bool) -> dict[str, Any]:
        """Starts the run, or goes on with it, and kills it if so asked and it does not finish before."""
        aim, number, delay_s = self.dice.choice(AIMS), self.dice.choice(SIGNALS), self.dice.random()
        victims = self.dice.choice([[self.dice.randrange(self.ranks)], list(range(self.ranks))])
        before, started = saved(folder), Started(self.server, folder, self.arguments, self.ranks)
        struck = kill and self._aimed(started, aim, delay_s)
        row: dict[str, Any] = self._named("kill" if struck else "run")
        least, (step, phase) = saved(folder), started.at()
        if struck:
            row |= {"signal": number.name, "to": "all" if len(victims) == self.ranks else f"rank {victims[0]}"}
            row |= {"during": "end" if aim == "end" else phase, "step": step, "saved": least}
            for rank in victims:
                if started.ranks[rank] not in self.server.codes:
                    os.kill(started.ranks[rank], number)
        begin = time.monotonic()
        if struck and phase == "start":  # ranks that do not know each other yet wait for each other
            started.as_launcher(LAUNCHER_S)
        ended = started.wait(END_S if struck else 600.0)
        codes, left = started.codes(), started.alive()
        for process in left:
            os.kill(process, signal.SIGKILL)
        problems = [] if ended else [f"still running after {END_S:.0f} s"]
        problems += [f"{len(left)} processes left"] if ended and left else []
        warnings: list[str] = []
        newest = checkpoints.find(folder / "ck", warnings.append)
        found = newest.step if newest else 0
        if found < max(least, before):
            problems.append(f"the newest intact checkpoint is of step {found}, that of step {max(least, before)} was there")
        problems += warnings
        if struck:
            polite = number != signal.SIGKILL and phase != "start" and codes != [0] * self.ranks
            if polite and (set(codes) != {75} or found < step - 1):
                problems.append(f"exit codes {codes}, checkpoint of step {found}")
            row |= {"codes": codes, "found": found, "lost": max(0, step - 1 - found), "end_s": round(time.monotonic() - begin, 2)}
        elif codes != [0] * self.ranks:
            problems.append(f"exit codes {codes}: {started.log.read_text()[-2000:]}")
        if problems:
            row["log"] = started.log.read_text()[-3000:]
        return row | {"ok": not problems, "problems": problems, "finished": codes == [0] * self.ranks or (not struck and bool(problems))}

    def _aimed(self, started: Started, aim: str, delay_s: float) -> bool:
        """Waits for the moment of the kill; False where the run has ended before."""
        if aim == "start":
            time.sleep(delay_s * self.seconds / 2)
        else:
            after = delay_s * STEPS  # the first time after this step
            while not started.ended() and not (started.at()[0] >= min(after, STEPS - EVERY - 2) and reached(started, aim)):
                time.sleep(0.0005)
            time.sleep(0.02 * self.dice.random() if aim != "end" else 0.5 * self.dice.random())
        return not started.ended()


def soak(kills: int, kinds: Sequence[tuple[int, str]], chains: int, seed: int, work: Path) -> Iterator[dict[str, Any]]:
    """Rows of all kinds, `kills` shared out over them, from `chains` at a time."""
    from mlflow import MlflowClient

    store = work / "empty.db"
    MlflowClient(f"sqlite:///{store}").search_experiments()
    rows: list[dict[str, Any] | None] = []
    waiting = [(kind, kills * (i + 1) // len(kinds) - kills * i // len(kinds)) for i, kind in enumerate(kinds)]
    ready = threading.Condition()

    def put(row: dict[str, Any] | None) -> None:
        with ready:
            rows.append(row)
            ready.notify()

    def chain() -> None:
        try:
            server = Server()
            while waiting:
                (ranks, engine), share = waiting.pop(0)
                for row in Kind(server, work, store, ranks, engine, random.Random(f"{seed} {ranks} {engine}")).rows(share):
                    put(row)
            server.close()
        except BaseException as error:
            put({"event": "soak", "ok": False, "problems": [repr(error)]})
        put(None)

    for _ in range(chains):
        threading.Thread(target=chain, daemon=True).start()
    while chains:
        with ready:
            ready.wait_for(lambda: bool(rows))
            row = rows.pop(0)
        if row is None:
            chains -= 1
        else:
            yield row


def table(written: dict[str, Any]) -> str:
    """A finished soak in Markdown: a row per kind of run."""
    kills = [row for row in written["rows"] if row["event"] == "kill"]
    lines = [
        "| run | kills | SIGKILL, SIGTERM, SIGUSR1 | start, step, checkpoint, evaluation, end "
        "| most steps lost | longest end, s | finished, equal | problems |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for ranks, engine in sorted({(row["ranks"], row["engine"]) for row in kills}, key=lambda kind: (list(ENGINES).index(kind[1]), kind[0])):
        rows = [row for row in written["rows"] if (row.get("ranks"), row.get("engine")) == (ranks, engine)]
        own = [row for row in rows if row["event"] == "kill"]
        by = Counter(row["signal"] for row in own) + Counter(row["during"] for row in own)
        signals, phases = (", ".join(str(by[name]) for name in names) for names in (("SIGKILL", "SIGTERM", "SIGUSR1"), AIMS))
        finished = [row for row in rows if row["event"] == "finished"]
        most, longest = max(row["lost"] for row in own), max(row["end_s"] for row in own)
        cells = [f"{engine}, {ranks} rank{'s' if ranks > 1 else ''}", len(own), signals, phases, most, f"{longest:.1f}", len(finished)]
        lines.append("| " + " | ".join(map(str, [*cells, sum(not row["ok"] for row in rows)])) + " |")
    bad = sum(not row["ok"] for row in written["rows"])
    end = f"{len(kills)} kills in {written['seconds'] / 60:.0f} minutes, seed {written['seed']}; {bad} rows with a problem."
    return "\n".join([*lines, "", end]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 where anything was lost, left or different."""
    parser = argparse.ArgumentParser(description="Kills runs at random, and looks for what is lost.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--chains", type=int, default=2, help="runs at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=None, help="such as 1:torch 2:3 (ranks, and torch or the ZeRO stage); default: all ten")
    parser.add_argument("--json", type=Path, default=REPOSITORY / "docs" / "results" / "soak.json")
    parser.add_argument("--table", action="store_true", help="kill nothing, and print what the JSON holds as a table")
    given = parser.parse_args(arguments)
    if given.table:
        print(table(json.loads(given.json.read_text())), end="")
        return 0
    kinds = [(ranks, engine) for engine in ENGINES for ranks in (1, 2)]
    if given.kinds:
        pairs = [kind.split(":") for kind in given.kinds]
        kinds = [(int(ranks), engine if engine == "torch" else f"ZeRO {engine}") for ranks, engine in pairs]
    begin, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as work:
        for row in soak(given.kills, kinds, given.chains, given.seed, Path(work)):
            rows.append(row)
            print(json.dumps(row), flush=True)
            written = {"kills": sum(r["event"] == "kill" for r in rows), "seed": given.seed, "seconds": round(time.monotonic() - begin), "rows": rows}
            given.json.parent.mkdir(parents=True, exist_ok=True)
            with atomic(given.json) as part:
                part.write_text(json.dumps(written, indent=0) + "\n")
    bad = [row for row in rows if not row["ok"]]
    during = Counter(row["during"] for row in rows if row["event"] == "kill")
    finished = sum(row["event"] == "finished" for row in rows)
    print(f"{sum(during.values())} kills ({dict(during)}), {finished} runs finished, {len(bad)} with a problem, {time.monotonic() - begin:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
