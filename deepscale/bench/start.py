"""`deepscale bench start`: CPU seconds until DeepSpeed is ready, at depth and at 26 layers."""

from deepscale.bench.options import Options, say, settings_of
from deepscale.bench.report import Goal, Row, ratio
from deepscale.bench.worker import run_worker
from deepscale.depth import blocks_for_depth, depth_of_blocks
from deepscale.parsing import parse_depth

GOAL_CPU_S = Goal(5.0)
GOAL_RATIO = Goal(2.0)


def main(arguments: list[str]) -> None:
    """Measures deepspeed.initialize in fresh processes, deep and shallow in turn. Raises BenchError where one fails."""
    options = Options("start", "CPU seconds of AdamW and deepspeed.initialize in a fresh process, deep and shallow networks in turn.")
    options.depth("depth", 10_001, "layers of the deep network")
    options.depth("shallow-depth", 26, "layers of the network beside it")
    options.size("width", 8, "channels of stage 1")
    options.size("zero", 2, "ZeRO stage", low=0)
    options.size("rounds", 3, "processes per network")
    options.size("threads", 1, "threads per process")
    text = "layers of a plain network of separate modules to measure too (10,001 take minutes)"
    options.parser.add_argument("--reference-depth", type=parse_depth, metavar="N", help=text)
    options.time_limit()
    values, report = options.parse(arguments)
    networks = {"deep": ("stacked", values.depth), "shallow": ("stacked", values.shallow_depth)}
    if values.reference_depth is not None:
        networks["reference"] = ("plain", values.reference_depth)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in networks}
    for number in range(values.rounds):
        for name, (network, depth) in networks.items():
            say(f"start of {depth:,} layers, {network}, {number + 1} of {values.rounds}")
            wanted = {"network": network, "depth": depth, "batch_size": 8, **settings_of(values, "width", "zero", "threads")}
            taken[name].append(run_worker("deepscale.bench.deep", wanted, threads=values.threads, limit_s=values.time_limit))
    own = {name: [result["start_cpu_s"] for result in results] for name, results in taken.items()}
    cpu = {name: tuple(result["start_cpu_s"] + result["late_cpu_s"] for result in results) for name, results in taken.items()}
    label = {name: f"{depth_of_blocks(blocks_for_depth(depth)):,} layers" for name, (_, depth) in networks.items()}
    tensors = {name: f"{results[0]['tensors']:,} tensors" for name, results in taken.items()}
    how = {name: "in stacks" if network == "stacked" else "as separate modules" for name, (network, _) in networks.items()}
    goals = {"deep": GOAL_CPU_S}
    report.rows = [Row(f"initialize, {label[name]} {how[name]} ({tensors[name]})", "CPU s", cpu[name], goals.get(name)) for name in networks]
    report.rows.append(ratio(f"{label['deep']} / {label['shallow']}", cpu["deep"], cpu["shallow"], GOAL_RATIO))
    report.rows += [Row(f"{label[name]} {how[name]}, without what initialize imports", "CPU s", tuple(own[name])) for name in networks]
    report.publish(values.json)
