"""`deepscale prepare`: everything that needs a network, a compiler or minutes, done on a login node.

Downloads the data set, writes FFCV's .beton, builds the CPU ops (the blocks' kernel, DeepSpeed's optimiser) into a folder, and
checks them as a compute node will meet them: in a fresh process that finds no compiler.
"""

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from deepscale.config import AUTO, DataConfig, add_arguments, from_namespace, parser
from deepscale.errors import UsageError
from deepscale.ops import OPS, ensure_ops

CHECK_LIMIT_S = 300.0


def say(text: str) -> None:
    print(f"prepare: {text}", flush=True)


def main(arguments: list[str]) -> None:
    """Prepares data and ops, and prints what to set on compute nodes. Raises UsageError for what cannot be done."""
    command = parser("deepscale prepare", "Download, convert and build on a login node what compute nodes need.")
    add_arguments(command, DataConfig)
    command.add_argument("--ops-dir", metavar="D", help="folder for the CPU ops (default: .deepscale/ops in the data folder)")
    values = command.parse_args(arguments)
    data = from_namespace(values).data
    os.environ["DS_ACCELERATOR"] = "cpu"  # these ops are the CPU's, whatever a login node has
    ops = Path(values.ops_dir or Path(data.data_dir, ".deepscale", "ops")).expanduser().absolute()

    _check_writable(ops, "--ops-dir")
    prepare_data(data)
    prepare_ops(ops)
    for line in advice(data, ops):
        print(line)


def _check_writable(folder: Path, option: str) -> None:
    # A file is really made: permission bits say nothing on a read-only file system or a full quota.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"{option} {folder} cannot be written ({error.strerror or error}); give another folder: {option} FOLDER") from None


def prepare_data(data: DataConfig) -> None:
    """The data set in its folder, and its .beton unless `--feed tensors`; without FFCV a line says so.

    `auto` means CIFAR-10 here: compute nodes would otherwise train on synthetic images without anyone having asked for it.
    Raises UsageError where the data cannot be had, and with `--feed ffcv` where the .beton cannot be written.
    """
    from deepscale.data.beton import FeedUnavailable, beton_path, write_beton
    from deepscale.data.sources import load_source

    source = load_source(replace(data, dataset="cifar10") if data.dataset == AUTO else data, say)
    info = source.info
    say(f"{info.label}: {info.train_images:,} training, {info.validation_images:,} validation, {info.test_images:,} test images in {data.data_dir}")
    if data.feed == "tensors":
        return
    path = beton_path(source, data)
    try:
        write_beton(source, path, say)
    except FeedUnavailable as error:
        if data.feed == "ffcv":
            raise
        say(f"without FFCV's file, the in-memory feed takes its place: {error}")
    else:
        say(f"{path} is verified")


def prepare_ops(folder: Path) -> None:
    """Every op in `folder`, built and checked. Raises UsageError with the reason where one cannot be had."""
    for name, reason in ensure_ops(OPS, say, folder=folder).items():
        reason, op = reason or check_without_compiler(name, folder), OPS[name]
        if reason:
            raise UsageError(f"{op.title} is not ready: {reason}. The data is; {op.without}. With the cause removed, type the same command again")
        say(f"{op.title} loads without a compiler and computes right, from {folder}")


def check_without_compiler(name: str, folder: Path) -> str | None:
    """Loads a built op in a process without compiler and tries it; None, or the sentence of what is wrong."""
    program = (
        "import pathlib, sys; sys.path.append(sys.argv[1]); from deepscale import ops;"
        "reason = ops.ensure_ops([sys.argv[2]], print, folder=pathlib.Path(sys.argv[3]))[sys.argv[2]];"
        "sys.exit(reason) if reason else ops.check_op(sys.argv[2])"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parents[1]), name, str(folder)]
    environment = {**os.environ, "PATH": os.devnull, "CXX": os.devnull}
    try:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CHECK_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"its check took more than {CHECK_LIMIT_S:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"its check ended with exit code {done.returncode}"])[-1]
    return None


def advice(data: DataConfig, ops: Path) -> list[str]:
    """The lines to type on compute nodes."""
    folder = Path(data.data_dir).expanduser().absolute()
    dataset = "" if data.dataset == AUTO else f" --dataset {data.dataset}"
    return [
        "",
        "Ready. In the job on the compute nodes (of the same processor type as this machine; on another, run this there once):",
        f"  export DEEPSCALE_OPS_DIR={shlex.quote(str(ops))}",
        f"  deepspeed deepscale/train.py --no-download --data-dir {shlex.quote(str(folder))}{dataset} --depth 10000",
    ]
