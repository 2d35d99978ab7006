"""slurm/ on a real Slurm of two virtual nodes (slurm_cluster.py), with the three lines of cluster.sh edited as docs/cluster.md says.

What only Slurm and the shell decide is tried with small commands in the place of the training, the rest with real trainings.
"""

import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY
from slurm_cluster import Cluster, missing

from deepscale import merge
from deepscale.tracking_read import Reader

SCRIPTS = sorted(path.name for path in (REPOSITORY / "slurm").glob("*.sbatch"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two idle nodes. Skips where Slurm is not installed, fails there in CI, which installs it."""
    reason = missing()
    if reason is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    cluster.start()
    yield cluster
    cluster.stop()


class Site:
    """A user's clone on the cluster's shared folder, as far as jobs need it; `jobs` is where they record."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder, self.jobs = cluster, folder, folder / "shared" / "jobs"
        for name in ("slurm", "tune"):
            shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        lines = (folder / "slurm" / "cluster.sh").read_text()
        lines = re.sub(r"^source .*", f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH", lines, flags=re.M)
        lines = re.sub(r"^export DEEPSCALE_SHARED=.*", f"export DEEPSCALE_SHARED={shlex.quote(str(folder / 'shared'))}", lines, flags=re.M)
        (folder / "slurm" / "cluster.sh").write_text(lines)
        # The scripts' library with any command in the place of the training.
        head = (folder / "slurm" / "train.sbatch").read_text().rpartition("begin_job")[0]
        (folder / "any.sbatch").write_text(f'{head}begin_job any\nsupervise launch "$SLURM_JOB_NUM_NODES" "$@"\n')

    def submit(self, *words: str) -> str:
        """The new job's id."""
        return self.cluster.command("sbatch", "--parsable", f"--chdir={self.folder}", *words, cwd=self.folder).strip()

    def state(self, job: str) -> str:
        return re.findall(r"JobState=(\S+)", self.cluster.command("scontrol", "show", "job", job))[-1]

    def output(self, job: str) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"slurm-{job}*.out")))

    def wait(self, job: str, what: Callable[[], bool], timeout_s: float) -> None:
        """Waits until something is so; fails with the job's output."""
        limit = time.monotonic() + timeout_s
        while not what():
            if time.monotonic() > limit:
                pytest.fail(f"job {job} is {self.state(job)} after {timeout_s:.0f} s; its output:\n{self.output(job)}")
            time.sleep(0.1)

    def end(self, job: str, timeout_s: float = 60.0) -> str:
        """The state in which the job ends."""
        self.wait(job, lambda: self.state(job) not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"), timeout_s)
        return self.state(job)


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    yield Site(cluster, tmp_path)
    cluster.command("scancel", "--full", "--quiet", "--user", str(os.getuid()), check=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_slurm_accepts_each_script(site: Site, script: str) -> None:
    """On two nodes with all their GPUs."""
    answer = site.cluster.command("sbatch", "--test-only", "--nodes=2", "--gpus-per-node=2", f"slurm/{script}", cwd=site.folder)
    assert re.search(r"Job \d+ to start at .* on nodes node\[1-2\]", answer), answer


def test_ranks_and_arguments(site: Site) -> None:
    """Two nodes with two GPUs each: four ranks that know their place, one address and port, and arguments as they were typed."""
    odd = ["two  spaces", "it's", 'a "quote"', "$HOME `id` \\ ; & *", ""]
    program = "import json, os, sys; r = os.environ['RANK']; json.dump([dict(os.environ), sys.argv[1:]], open(f'rank{r}.json', 'w'))"
    job = site.submit("--nodes=2", "--gpus-per-node=2", "--cpus-per-task=4", "any.sbatch", "python", "-c", program, *odd)
    assert site.end(job) == "COMPLETED", site.output(job)
    ranks = [json.loads((site.folder / f"rank{rank}.json").read_text()) for rank in range(4)]
    assert all(arguments == odd for _, arguments in ranks)
    places = [[environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURMD_NODENAME")] for environment, _ in ranks]
    assert places == [[str(rank), "4", str(rank % 2), "2", f"node{1 + rank // 2}"] for rank in range(4)]
    assert {(e["MASTER_ADDR"], e["MASTER_PORT"], e["OMP_NUM_THREADS"]) for e, _ in ranks} == {("127.0.0.1", str(20000 + 20 * (int(job) % 500)), "2")}
    assert {e["MLFLOW_TRACKING_URI"] for e, _ in ranks} == {f"sqlite:///{site.jobs}/any-{job}/mlflow.db"}


STOPS = """\
import os, signal, sys, time
sys.stdout.reconfigure(line_buffering=True)
def stop(number, frame):
    open(f"stopped{os.environ['RANK']}", "a").write(signal.Signals(number).name + "\\n")
    sys.exit(75)
if os.path.exists("stopped0"):
    sys.exit("resumed" if not sys.argv[1:] else int(sys.argv[1]))
time.sleep(2)  # not listening yet
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, stop)
print("listening")
time.sleep(60)
"""


def test_the_signal_before_the_limit_stops_all_ranks_and_requeues(site: Site) -> None:
    """Also where it comes before the program listens; the job runs again, and ends with what the second start ended with."""
    (site.folder / "stops.py").write_text(STOPS)
    job = site.submit("--nodes=2", "any.sbatch", "python", "stops.py", "7")
    site.wait(job, lambda: "records and checkpoints" in site.output(job), 30)
    site.cluster.command("scancel", "--signal=USR1", "--batch", job)
    assert site.end(job) == "FAILED"
    assert "started for the 2. time" in site.output(job)
    assert "ExitCode=7:0" in site.cluster.command("scontrol", "show", "job", job)
    assert [set((site.folder / f"stopped{rank}").read_text().split()) for rank in range(2)] == [{"SIGUSR1"}] * 2


def test_a_cancelled_job_stops_and_stays_cancelled(site: Site) -> None:
    """scancel is a wish to stop: every rank hears SIGTERM, and nothing is requeued."""
    (site.folder / "stops.py").write_text(STOPS)
    job = site.submit("--nodes=2", "any.sbatch", "python", "stops.py")
    site.wait(job, lambda: site.output(job).count("listening") == 2, 30)
    site.cluster.command("scancel", job)
    assert site.end(job) == "CANCELLED"
    site.wait(job, lambda: all((site.folder / f"stopped{rank}").exists() for rank in range(2)), 10)
    assert "SIGTERM" in (site.folder / "stopped1").read_text()


def test_a_dead_node_requeues_its_job(site: Site) -> None:
    """A node's daemon and all its processes are killed; Slurm, told so to spare its time-out, starts the job on another node."""
    program = "import os, time; print('up', os.environ['SLURMD_NODENAME'], flush=True); 'SLURM_RESTART_COUNT' in os.environ or time.sleep(60)"
    job = site.submit("--nodes=1", "--nodelist=node2", "any.sbatch", "python", "-c", program)
    site.wait(job, lambda: "up node2" in site.output(job), 30)
    site.cluster.kill_node("node2")
    site.cluster.command("scontrol", "update", "nodename=node2", "state=down", "reason=killed")
    try:
        site.wait(job, lambda: site.state(job) == "PENDING", 30)
        site.cluster.command("scontrol", "update", f"jobid={job}", "NodeList=node1")
        assert site.end(job) == "COMPLETED"
        assert site.output(job).count("up node1") == 1
    finally:
        site.cluster.start_node("node2")
        site.cluster.command("scontrol", "update", "nodename=node2", "state=resume", check=False)  # where it has not come back by itself
        site.wait(job, site.cluster.idle, 30)


def test_what_is_missing_gets_a_sentence(site: Site) -> None:
    """A ladder without depths or with more tasks than depths; an earlier job or a shared folder that is not there."""
    lines = site.folder / "slurm" / "cluster.sh"
    jobs = [site.submit("--array=0", "slurm/ladder.sbatch", "--max-steps", "1"), site.submit("--array=2", "slurm/ladder.sbatch", "26,104")]
    assert {site.end(job) for job in jobs} == {"FAILED"}
    assert "the depths come first, as in: sbatch --array=0-2 slurm/ladder.sbatch 26,1004,10001" in site.output(jobs[0])
    assert "array task 2 has no depth among 26,104: submit with --array=0-1" in site.output(jobs[1])
    job = site.submit("--export=ALL,DEEPSCALE_JOB=train-7", "any.sbatch", "true")
    assert site.end(job) == "FAILED"
    assert f"DEEPSCALE_JOB=train-7 names no job of {site.jobs}" in site.output(job)
    assert not (site.jobs / "train-7").exists()
    lines.write_text(re.sub(r"^export DEEPSCALE_SHARED=.*", "export DEEPSCALE_SHARED=/proc/nowhere", lines.read_text(), flags=re.M))
    job = site.submit("any.sbatch", "true")
    assert site.end(job) == "FAILED"
    assert "is /proc/nowhere (slurm/cluster.sh) there" in site.output(job)


TINY = [
    "--dataset", "synthetic", "--feed", "tensors", "--depth", "14", "--width", "4", "--patch-size", "4", "--batch-size", "16", "--eval-images", "40",
    "--eval-every", "1000", "--kernel", "torch", "--record-every", "0",
]  # fmt: skip


def losses(store: Path) -> tuple[list[tuple[int, float]], str]:
    """Every training loss of the only run in a store, and how the run ended."""
    reader = Reader(f"sqlite:///{store}")
    (run,) = reader.runs()
    return reader.history(run, "train/loss"), run.info.status


def test_a_training_on_two_nodes_goes_on_after_the_signal_and_ends_at_the_same_loss(site: Site) -> None:
    """ZeRO 1 on two nodes: stopped by the signal in the middle, requeued, resumed; every loss as of a run that was left alone."""
    training = ["--nodes=2", "slurm/train.sbatch", *TINY, "--zero", "1", "--max-steps", "120"]
    name = 'it\'s "two" nodes'
    whole, cut = site.submit(*training), site.submit(*training, "--run-name", name)
    site.wait(cut, lambda: "step 1/" in site.output(cut), 150)
    site.cluster.command("scancel", "--signal=USR1", "--batch", cut)
    assert [site.end(job, 180) for job in (whole, cut)] == ["COMPLETED", "COMPLETED"], site.output(cut)
    expected, status = losses(site.jobs / f"train-{whole}" / "mlflow.db")
    resumed, resumed_status = losses(site.jobs / f"train-{cut}" / "mlflow.db")
    assert len(expected) == 120 and resumed == expected
    assert status == resumed_status == "FINISHED"


def test_a_ladder_of_depths_and_its_stores_merged(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """An array of two depths: each task trains its own and records in a store of its own; `deepscale merge` brings them together."""
    job = site.submit("--array=0-1", "slurm/ladder.sbatch", "14,26", *TINY, "--max-steps", "2", "--engine", "torch")
    tasks = [f"{job}_0", f"{job}_1"]
    for task in tasks:
        site.wait(task, lambda task=task: site.state(task) == "COMPLETED", 180)
    monkeypatch.chdir(site.folder)
    merge.main([str(site.jobs)])
    runs = Reader(f"sqlite:///{site.folder}/mlflow.db").runs("deepscale")
    assert sorted(int(run.data.params["built_depth"]) for run in runs) == [14, 26]
    assert all((site.jobs / f"ladder-{task}" / "checkpoints").is_dir() for task in tasks)


def test_a_sweep_on_a_ray_cluster_of_both_nodes(site: Site) -> None:
    """A grid of two trainings, one on each node at the same time; Ray is gone with the job, and each trial has its store."""
    pytest.importorskip("ray")
    grid = ["--grid", "layerscale_init=0,1", "--cpus-per-trial", "2"]
    job = site.submit("--nodes=2", "--cpus-per-task=2", "slurm/sweep.sbatch", *grid, *TINY, "--max-steps", "2", "--engine", "torch")
    assert site.end(job, 240) == "COMPLETED", site.output(job)
    assert "sweep: 2 nodes, 4 cores, 0 GPUs" in site.output(job)
    assert re.search(r"^\| 1 +\| +1 \| +\d+\.\d\d %", site.output(job), flags=re.M), site.output(job)
    stores = sorted((site.jobs / f"sweep-{job}").glob("sweep/trials/*/mlflow.db"))
    settings = [run.data.params["layerscale_init"] for store in stores for run in Reader(f"sqlite:///{store}").runs("sweep")]
    assert sorted(map(float, settings)) == [0.0, 1.0]
    assert not Path(f"/tmp/deepscale-ray-{job}").exists()
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if f"deepscale-ray-{job}".encode() in _bytes(path)]
    assert not left


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
