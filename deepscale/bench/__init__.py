"""`deepscale bench`: the promises on speed and memory, measured again by anyone.

    deepscale bench start|step|memory|activations|reversible|revolve|depth|growth|scaling|data|gradflow|checkpoint|sweep|zero3|nvme|plan|gpu
    [--json FILE]

Each prints a table with its goals, and beside it the hardware, the versions, the sizes and the exact command. What is compared
is measured interleaved in one run, since a machine's speed drifts; what is absolute is CPU time or resident memory of fresh
processes, repeated. The defaults are the sizes of the goals; smaller ones make a quick try.

| module | what |
|---|---|
| those named as the commands | the commands |
| deep.py, kept.py, recorded.py, trial.py, gathered.py, planned.py, ranked.py, saved.py | programs that commands start as processes (`worker.py`) |
| limit.py, bracket.py | a process within a limit of memory, and the search for the deepest that trains |
| networks.py | the networks that are measured, and one training step of them |
| gpu_worker.py and gpu_*.py | the program of the GPU bench: checks, steps, profile; what it measures (gpu_cells.py) |
| scaling_study.py, scaling_page.py, traffic.py | points of a scaling study, their page and figure; bytes and collectives, counted |
| flops.py | floating point operations, counted |
| report.py | goals, rows, the table, the JSON file |
"""

import importlib

from deepscale.errors import UsageError, unknown_choice

BENCHES = {
    "start": "CPU seconds of deepspeed.initialize, at 10,001 and at 26 layers",
    "step": "a training step: stacked against the plain network, recomputed against kept, and 10,001 layers",
    "memory": "peak memory of training 10,001 layers, and the activations that recomputation leaves",
    "activations": "every activation policy: time of a step, FLOPs, bytes kept, loss and gradients against keeping all",
    "reversible": "reversible blocks beside recomputed ones: bytes kept, time of a step, and errors of reconstruction",
    "revolve": "inputs in few slots beside all inputs kept: bytes, FLOPs and time, and the schedule for given bytes",
    "depth": "how deep each activation policy trains within a limit of memory, against the plain network",
    "growth": "start, step time and memory from 26 to 10,001 layers, and their exponents",
    "scaling": "strong and weak scaling over ranks and ZeRO stages: speed, bytes sent, memory, communication",
    "gradflow": "what recording the gradient of every layer costs",
    "data": "CPU time per image of the feeds, against a torchvision PIL DataLoader",
    "checkpoint": "saving a checkpoint of 10,001 layers beside writing as many bytes, the wait of an asynchronous save, and resuming",
    "sweep": "what a trial of a sweep takes beside its training, and two trials at once of each other's time",
    "zero3": "ZeRO-3 at 10,001 layers: start, step and memory beside the other stages, and what two ranks gather at once",
    "nvme": "states and parameters on a disk beside host memory: step, peak memory, and whether training is the same",
    "plan": "memory and seconds as planned against as measured, over many configurations",
    "gpu": "one GPU: is it right, how long is a step, how much memory, at 26 to 10,001 layers and widths 64 to 512",
}


def main(arguments: list[str]) -> None:
    """Runs the bench that the first argument names. Raises UsageError for bad input."""
    usage = "\n".join(["usage: deepscale bench NAME [--json FILE] [sizes: see deepscale bench NAME --help]", ""])
    usage += "\n".join(f"  {name:<12}{text}" for name, text in BENCHES.items())
    if arguments[:1] in (["-h"], ["--help"]):
        print(usage)
        return
    if not arguments:
        raise UsageError(f"deepscale bench needs a name: {', '.join(BENCHES)}; type for example deepscale bench start")
    if arguments[0] not in BENCHES:
        raise unknown_choice("the bench", arguments[0], BENCHES)
    importlib.import_module(f"deepscale.bench.{arguments[0]}").main(arguments[1:])
