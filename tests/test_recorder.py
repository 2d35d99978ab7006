"""The recorder, against plain loops over `p.grad` of the unstacked reference: every engine, one rank and two, and the record's own life.

The engines' cases run in three processes at once (recorder_worker.py): one rank, and two ranks with the same global batch.
"""

import errno
import json
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_ranks
from policies import in_segments
from torch import Tensor, nn

from deepscale.config import ModelConfig
from deepscale.errors import UsageError
from deepscale.gradflow import Flow, Recorder, load, recorder
from deepscale.gradflow.flow import BLOCK_FIELDS, LAYER_FIELDS
from deepscale.models.convnext import ConvNeXt, cross_entropy
from deepscale.models.naming import load_plain
from deepscale.models.reference import PlainBlock, PlainConvNeXt

pytest.importorskip("deepspeed")
import engine_worker
import recorder_worker
from test_observe import hooked

SHARES = ("zeros", "nonfinite", "saturated", "dead")
RECORDED_GRADIENT = ("mean_abs", "l2", "max_abs", "zeros", "nonfinite")
# A scalar gamma's gradient is a sum that cancels: below this part of the largest layer's it may be off. Weights have no floor.
GAMMA_FLOOR = 1e-6
Floats = np.ndarray[Any, np.dtype[np.float64]]


def plain_layers(plain: PlainConvNeXt) -> dict[str, Floats]:
    """The fields of every layer, (L,), by a loop over the unstacked network's parameters in path order."""
    found: dict[str, list[float]] = {name: [] for name in (*RECORDED_GRADIENT, "weight_l2")}
    parameters = dict(plain.named_parameters())
    for name in names_of(plain):
        parameter = parameters[name]
        assert parameter.grad is not None
        g = parameter.grad.double()
        found["mean_abs"].append(g.abs().mean().item())
        found["l2"].append(g.norm().item())
        found["max_abs"].append(g.abs().max().item())
        found["zeros"].append((g == 0).double().mean().item())
        found["nonfinite"].append((~torch.isfinite(g)).double().mean().item())
        found["weight_l2"].append(parameter.detach().double().norm().item())
    return {name: np.array(values) for name, values in found.items()}


def names_of(plain: PlainConvNeXt) -> list[str]:
    """The layers' names in path order, written out."""
    names = ["stem.conv.weight"]
    for s, stage in enumerate(plain.path):
        names += [f"stages.{s}.downsample.conv.weight"] * (s > 0)
        for b, block in enumerate(stage.blocks):
            own = ["dwconv.weight", "pwconv1.weight", "pwconv2.weight"] + ["gamma"] * (block.gamma is not None)
            names += [f"stages.{s}.blocks.{b}.{name}" for name in own]
    return [*names, "head.linear.weight"]


def assert_layers(flow: Flow, record: int, expected: dict[str, Floats], rtol: float, floor: float = GAMMA_FLOOR, share: float = 1e-6) -> None:
    """A record's fields within `rtol`; gammas within `floor` of the largest value too.

    In low precision, greatest elements within five times that; the update ratios of gammas are left out, since AdamW makes whole steps of a
    clipped gradient that cancels (in float32 they are within 1e-4).
    """
    gamma = flow.layer_kinds == "gamma"
    for name, values in expected.items():
        found = getattr(flow, name)[record].astype(np.float64)
        allowed = (5 if name == "max_abs" and rtol > 1e-3 else 1) * rtol * values + gamma * floor * np.nanmax(values)
        if name == "update_ratio":
            allowed[gamma] = 1e-4 * values[gamma] if rtol < 1e-3 else np.inf
        if name in SHARES:
            allowed = np.full(len(values), share)
        worst = int(np.argmax(np.abs(found - values) - allowed))
        assert (np.abs(found - values) <= allowed).all(), (name, str(flow.layer_names[worst]), found[worst], values[worst])


# ------------------------------------------------------------------------------------------- one process, against the reference


def batch(images: int, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(images, 3, 32, 32, generator=random).to(dtype), torch.arange(images) % 10


def pair(dtype: torch.dtype, segment: int = 0, **settings: Any) -> tuple[ConvNeXt, PlainConvNeXt]:
    """The stacked network and the plain one with the same values."""
    config = ModelConfig(**{"width": 4, "patch_size": 4, **settings})
    plain = PlainConvNeXt(config).initialise(0).to(dtype)
    model = in_segments(segment).apply(ConvNeXt(config)).to(dtype)
    load_plain(model, plain.state_dict())
    return model, plain


@pytest.mark.parametrize(("segment", "init"), [(0, 1.0), (3, None), (0, 0.0), (2, 1e-6)])
def test_50_blocks_equal_a_loop_over_the_plain_network(segment: int, init: float | None) -> None:
    """152 layers in float64, rtol 1e-9 (gammas: 1e-13 of the largest); names, kinds and depths by the plain network's own."""
    model, plain = pair(torch.float64, segment, depth=152, layerscale_init=init)
    images, labels = batch(4, torch.float64)
    record = Recorder(model)
    record.begin(1)
    cross_entropy(model(images), labels).backward()
    record.gradients()
    flow = record.flow()
    assert flow.layer_names.tolist() == names_of(plain)
    assert flow.depth == 152 and sum(flow.weights) - sum(flow.layer_kinds == "downsample") == 152
    assert flow.block_names.tolist() == [name for name, module in plain.named_modules() if isinstance(module, PlainBlock)]
    assert len(flow.block_names) == 50 and flow.l2.dtype == np.float64
    assert flow.block_depths.tolist() == [1 + 3 * (block + 1) for block in range(50)], "of a block's last layer, after the stem"
    cross_entropy(plain(images), labels).backward()
    expected = plain_layers(plain)
    assert_layers(flow, 0, expected, rtol=1e-9, floor=1e-13)
    if init == 0.0:  # closed: weights inside blocks have gradient 0, exactly
        inside = np.isin(flow.layer_kinds, ("dwconv", "pwconv1", "pwconv2"))
        assert (flow.zeros[0, inside] == 1).all() and (flow.l2[0, inside] == 0).all() and (flow.zeros[0, ~inside] < 1).all()


@pytest.mark.parametrize(("segment", "init"), [(0, 1.0), (6, 1e-6)])
def test_1004_layers_equal_a_loop_over_the_plain_network(segment: int, init: float) -> None:
    """float32, rtol 1e-3 (measured: 1e-6); gammas within 1e-6 of the largest too (measured: within 5e-5 of themselves)."""
    model, plain = pair(torch.float32, segment, depth=1004, layerscale_init=init)
    images, labels = batch(4, torch.float32)
    record = Recorder(model)
    record.begin(1)
    cross_entropy(model(images), labels).backward()
    record.gradients()
    outputs = gradients_of_outputs(plain)
    cross_entropy(plain(images), labels).backward()
    flow = record.flow()
    assert flow.depth == 1004 and flow.layer_names.tolist() == names_of(plain)
    assert_layers(flow, 0, plain_layers(plain), rtol=1e-3)
    assert np.allclose(flow.output_grad_l2[0], outputs(), rtol=1e-3, atol=0)


def gradients_of_outputs(plain: nn.Module) -> Callable[[], list[float]]:
    """Keeps the output of every block in the next pass; what is returned gives the norms of their gradients after backward."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, out: Tensor) -> None:
        out.retain_grad()
        kept.append(out)

    for module in plain.modules():
        if isinstance(module, PlainBlock):
            module.register_forward_hook(keep)
    return lambda: [x.grad.double().norm().item() for x in kept if x.grad is not None]


def trained(record: Recorder, model: nn.Module, steps: int, clip: float | None = None) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Trains and records every step; the gradients before clipping and the weights before the step, and after, by loops."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gradients, weights = [], []
    for step in range(1, steps + 1):
        record.begin(step)
        images, labels = batch(4, torch.float32, seed=step)
        cross_entropy(model(images), labels).backward()
        record.gradients()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        record.finish()
        optimizer.zero_grad()
    weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return gradients, weights


def test_several_records_of_a_training_and_of_gradients_before_clipping() -> None:
    """Five steps clipped to 1e-6 of their norm: each record is its own step's, of unclipped gradients."""
    model, _ = pair(torch.float32, depth=26, layerscale_init=1.0)
    record = Recorder(model)
    gradients, weights = trained(record, model, 5, clip=1e-6)
    flow = record.flow({"run_name": "five"})
    assert flow.steps.tolist() == [1, 2, 3, 4, 5] and flow.meta["run_name"] == "five" and "before clipping" in flow.meta["gradients"]
    stem = flow.layer("stem.conv")
    for i in range(5):
        assert flow.l2[i, stem] == pytest.approx(gradients[i]["stem.conv.weight"].double().norm().item(), rel=1e-5)
        assert flow.weight_l2[i, stem] == pytest.approx(weights[i]["stem.conv.weight"].double().norm().item(), rel=1e-5)
    assert len(set(flow.l2[:, stem].tolist())) == 5


@pytest.mark.parametrize("share", [None, 1 / 3])
def test_update_ratios_equal_those_of_full_copies(monkeypatch: pytest.MonkeyPatch, share: float | None) -> None:
    """Every layer's where weights are few; with room for a third of them, those of some stacks and of what is in none, NaN elsewhere."""
    if share is not None:
        monkeypatch.setattr(recorder, "CHANGE_BYTES", 0)
        monkeypatch.setattr(recorder, "CHANGE_SHARE", share)
    config = ModelConfig(depth=74, width=4, patch_size=4, layerscale_init=1.0)
    model = ConvNeXt(config, stack_size=3).initialise(0)
    record = Recorder(model)
    _, weights = trained(record, model, 3)
    flow = record.flow()
    places = {name: (where.name, where.index) for name, where in model.plain_names()}
    known = ~np.isnan(flow.update_ratio)
    assert (known == known[0]).all() and known[0].any() and known[0].all() == (share is None)
    assert known[0][np.isin(flow.layer_kinds, ("stem", "downsample", "head"))].all()
    if share is not None:
        copied = sum(w.numel() for name, w in weights[0].items() if any(places[n][0] == name for n in flow.layer_names[known[0]]))
        assert copied <= 0.6 * sum(w.numel() for w in weights[0].values())
        assert known[0][:40].any() and known[0][-40:].any(), "spread over the path"
    for i in range(3):
        for layer in np.flatnonzero(known[0]):
            name, index = places[str(flow.layer_names[layer])]
            before, after = (weights[k][name].double() if index is None else weights[k][name][index].double() for k in (i, i + 1))
            assert flow.update_ratio[i, layer] == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-4)


def test_a_record_without_begin_has_no_blocks_and_without_finish_no_updates() -> None:
    model, plain = pair(torch.float32, depth=26, layerscale_init=1.0)
    record = Recorder(model)
    images, labels = batch(4, torch.float32)
    cross_entropy(model(images), labels).backward()
    record.gradients(7)
    cross_entropy(plain(images), labels).backward()
    flow = record.flow()
    assert flow.steps.tolist() == [7]
    assert_layers(flow, 0, plain_layers(plain), rtol=1e-4)
    assert all(np.isnan(getattr(flow, name)).all() for name in (*BLOCK_FIELDS, "update_ratio"))


def test_steps_between_records_leave_no_trace() -> None:
    """A loop that calls `finish` on every step and records every second: as if only these had been run with it."""
    flows = []
    for every in (1, 2):
        model, _ = pair(torch.float32, depth=26, layerscale_init=1.0)
        record, optimizer = Recorder(model), torch.optim.SGD(model.parameters(), 0.1)
        for step in range(1, 5):
            if step % every == 0:
                record.begin(step)
            images, labels = batch(4, torch.float32, seed=step)
            cross_entropy(model(images), labels).backward()
            if step % every == 0:
                record.gradients()
            optimizer.step()
            record.finish()
            optimizer.zero_grad()
        flows.append(record.flow())
    assert flows[0].steps.tolist() == [1, 2, 3, 4] and flows[1].steps.tolist() == [2, 4]
    for name in (*LAYER_FIELDS, *BLOCK_FIELDS):
        assert np.array_equal(getattr(flows[0], name)[1::2], getattr(flows[1], name), equal_nan=True), name


@pytest.mark.parametrize("capacity", [2, 3, 4, 5, 8])
def test_a_full_record_is_thinned(capacity: int) -> None:
    """30 steps into few places: the first and the last stay, and every row is the one of its step."""
    model, _ = pair(torch.float32, depth=14)
    record = Recorder(model, records=capacity)
    most = 0
    for step in range(1, 31):
        nn.init.constant_(model.stem.conv.weight, step)
        record.gradients(step)
        most = max(most, len(record.steps))
    flow = record.flow()
    assert most <= max(3, capacity), "what `records` asks for, and room for first, last and one between"
    assert flow.steps[0] == 1 and flow.steps[-1] == 30 and (np.diff(flow.steps) > 0).all()
    assert np.diff(flow.steps).max() <= 3 * 30 / max(3, capacity), "what stays covers the run"
    assert flow.weight_l2[:, 0].tolist() == pytest.approx((flow.steps * model.stem.conv.weight.numel() ** 0.5).tolist(), rel=1e-6)


def test_memory_is_bounded_and_set_aside_at_once() -> None:
    """200 records of 10,001 layers fit into 100 MB; a wider one takes fewer records."""
    with torch.device("meta"):
        model = ConvNeXt(ModelConfig(depth=10_001, width=4, patch_size=4, layerscale_init=None))
    model.to_empty(device="cpu")
    record = Recorder(model)
    assert record.capacity == 200 and record.values.nbytes <= 100e6
    assert Recorder(model, records=10_000).values.nbytes <= 100e6


def test_nonfinite_gradients_are_recorded_as_such() -> None:
    """NaN in one pixel reaches every layer, though not every tap of a kernel on 1 x 1 pixels."""
    model, _ = pair(torch.float32, depth=14, layerscale_init=1.0)
    record = Recorder(model)
    record.begin(1)
    images, labels = batch(4, torch.float32)
    images[0, 0, 0, 0] = torch.nan
    cross_entropy(model(images), labels).backward()
    record.gradients()
    flow = record.flow()
    assert (flow.nonfinite[0] > 0).all() and flow.nonfinite[0].mean() > 0.9 and np.isnan(flow.mean_abs[0]).all() and np.isnan(flow.max_abs[0]).all()
    assert np.isnan(flow.output_grad_l2[0]).all()


# ---------------------------------------------------------------------------------------------------------------- the file


@pytest.fixture(scope="module")
def small() -> Flow:
    model, _ = pair(torch.float32, depth=26, layerscale_init=1.0)
    record = Recorder(model)
    trained(record, model, 2)
    return record.flow({"run_name": "small", "settings": {"depth": 26}})


@pytest.mark.parametrize("folder", [True, False])
def test_a_record_read_is_the_one_written(small: Flow, tmp_path: Path, folder: bool) -> None:
    path = small.save(tmp_path / "deep" / "gradflow.npz")
    found = load(path.parent if folder else path)
    assert vars(found).keys() == vars(small).keys() and found.meta == small.meta
    for name, value in vars(small).items():
        if name != "meta":
            assert np.array_equal(getattr(found, name), value, equal_nan=getattr(value, "dtype", None) == np.float32), name
            assert getattr(found, name).dtype == value.dtype
    assert [p.name for p in path.parent.iterdir()] == ["gradflow.npz"], "nothing else is left"


def rewritten(path: Path, **changes: Any) -> None:
    """The file with other arrays; None leaves one out."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files} | changes
    np.savez_compressed(path, **{name: value for name, value in arrays.items() if value is not None})


def other_version(path: Path) -> None:
    rewritten(path, meta=np.array(json.dumps({"version": 2})))


class Trap:
    """Unpickling it would make a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["TRAP"],))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "truncated or something else"),
    "empty": (lambda path: path.write_bytes(b""), "truncated or something else"),
    "text": (lambda path: path.write_text("steps,layers\n1,2\n"), "truncated or something else"),
    "one bit": (lambda path: path.write_bytes(flipped(path.read_bytes())), "truncated or something else"),
    "one array": (lambda path: np.save(path.open("wb"), np.zeros(3)), "truncated or something else"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(Trap())), "truncated or something else"),
    "pickle inside": (lambda path: rewritten(path, steps=np.array([Trap()], dtype=object)), "truncated or something else"),
    "other version": (other_version, "version 2, this deepscale reads version 1"),
    "no version": (lambda path: rewritten(path, meta=np.array("{}")), "truncated or something else"),
    "no JSON": (lambda path: rewritten(path, meta=np.array("run")), "truncated or something else"),
    "JSON list": (lambda path: rewritten(path, meta=np.array("[1]")), "truncated or something else"),
    "missing field": (lambda path: rewritten(path, dead=None), "not a complete record"),
    "other shape": (lambda path: rewritten(path, l2=np.zeros((1, 2))), "not a complete record"),
    "other names": (lambda path: rewritten(path, layer_kinds=np.array(["stem"])), "not a complete record"),
    "no records": (lambda path: path.unlink(), "there is no record"),
}


def flipped(content: bytes) -> bytes:
    """One bit in the middle of the file, where compressed values lie."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_no_record_is_a_sentence(small: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """And nothing in it is run."""
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    path = small.save(tmp_path / "gradflow.npz")
    harm, said = DAMAGES[damage]
    harm(path)
    with pytest.raises(UsageError, match=said) as caught:
        load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()


def test_a_file_that_cannot_be_written_is_a_sentence(small: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder where a file is, and a disk that is full on the way: the record that lies there already stays, and nothing beside it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        small.save(tmp_path / "file" / "gradflow.npz")
    path = small.save(tmp_path / "gradflow.npz")

    def full(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(UsageError, match="No space left on device"):
        small.save(path)
    assert np.array_equal(load(path).steps, small.steps)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "gradflow.npz"]


def test_a_file_with_any_byte_changed_is_a_record_or_a_sentence(small: Flow, tmp_path: Path) -> None:
    """300 places in the file, each overwritten by another byte."""
    path = small.save(tmp_path / "gradflow.npz")
    content = path.read_bytes()
    refused = 0
    for place in range(0, len(content), len(content) // 300):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        try:
            found = load(path)
        except UsageError:
            refused += 1
            continue
        for name in LAYER_FIELDS:
            assert np.array_equal(getattr(found, name), getattr(small, name), equal_nan=True), f"byte {place}"
    assert refused > 200, refused


# -------------------------------------------------------------------------------------------------- engines, ranks, precisions

ENGINES = [("torch", "none"), *[(f"z{stage}", "none") for stage in range(4)], *[(f"z{stage}", "cpu") for stage in (1, 2, 3)]]
PRECISIONS = ("fp32", "bf16", "fp16")
FACTORS = ("engine", "ranks", "activations", "accumulation", "precision")
Case = dict[str, Any]


def all_cases() -> Iterator[Case]:
    """Every engine and offload in every precision; ranks, recomputation and accumulation in turn, so that every pair occurs."""
    for j, precision in enumerate(PRECISIONS):  # low precision last: DeepSpeed's autocast leaves a global flag
        for i, (engine, offload) in enumerate(ENGINES):
            case = {"engine": engine, "offload": offload, "precision": precision}
            activations = ("keep", "recompute")[(i // 2 + (j > 0)) % 2]
            case |= {"ranks": 1 + (i + j) % 2, "activations": activations, "accumulation": 1 + (i // 4 + i + (j > 1)) % 2}
            yield {"name": " ".join(str(value) for value in case.values()), **case}


CASES = {case["name"]: case for case in all_cases()}


def test_the_cases_hold_every_pair_of_settings() -> None:
    cases = [{**case, "engine": (case["engine"], case["offload"])} for case in CASES.values()]
    for one, two in combinations(FACTORS, 2):
        found = {(case[one], case[two]) for case in cases}
        assert len(found) == len({case[one] for case in cases}) * len({case[two] for case in cases}), (one, two)


def saved_by_ranks(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """What each rank saved of the cases of so many ranks."""
    return run_ranks("recorder_worker.py", [case for case in CASES.values() if case["ranks"] == ranks], folder, ranks, timeout_s=200)[0]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Future[list[dict[str, Any]]]]]:
    """The results of one rank and of two, which run at the same time."""
    with ThreadPoolExecutor(2) as pool:
        yield {ranks: pool.submit(saved_by_ranks, tmp_path_factory.mktemp(f"ranks{ranks}"), ranks) for ranks in (1, 2)}


@pytest.fixture(scope="module")
def reference() -> dict[int, tuple[dict[str, Floats], dict[str, Floats]]]:
    """Step -> fields of every layer with update ratios, and of every block: the plain network in float64, whole batches."""
    settings = recorder_worker.settings_of(CASES["torch none fp32 1 keep 1"])
    recipe = settings.recipe
    plain = recorder_worker.with_dead_units(PlainConvNeXt(settings.model, classes=engine_worker.CLASSES).initialise(0)).double()
    groups: list[list[Tensor]] = [[], []]
    for name, parameter in plain.named_parameters():
        groups[name.endswith("weight") and not name.endswith("norm.weight")].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1], "weight_decay": recipe.weight_decay}],
        lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps,
    )  # fmt: skip
    found = {}
    for step in range(1, recorder_worker.STEPS + 1):
        images, labels = recorder_worker.images_of(step)
        blocks = {name: values.numpy() for name, values in hooked(plain, images.double(), labels).items()}
        fields = plain_layers(plain)
        before = {name: p.detach().clone() for name, p in plain.named_parameters()}
        norm = nn.utils.clip_grad_norm_(plain.parameters(), recipe.clip)
        assert norm > 20 * recipe.clip, "clipping is what the record must not see"
        optimizer.step()
        optimizer.zero_grad()
        after = dict(plain.named_parameters())
        changed = [((after[name].detach() - before[name]).norm() / before[name].norm()).item() for name in names_of(plain)]
        found[step] = fields | {"update_ratio": np.array(changed)}, blocks
    return found


# Relative, of the first record and of the later one; of a share; and GAMMA_FLOOR. fp32 differs in rounding (measured: 3e-6). bf16 keeps 8
# bits and fp16 11, and may switch a ReLU unit on or off, which the greatest element of a gradient may feel five times as much.
BANDS = {"fp32": (2e-5, 2e-5, 1e-6, 1e-7), "bf16": (0.03, 0.1, 0.03, 5e-3), "fp16": (0.01, 0.02, 5e-3, 2e-4)}


@pytest.mark.parametrize("name", CASES)
def test_every_engine_records_what_the_plain_network_has(both: Any, reference: Any, name: str) -> None:
    """Two of four steps of AdamW, on every rank: first with blocks, then without. fp16 has skipped a step before the later one: see below."""
    precision = CASES[name]["precision"]
    first, later, share, floor = BANDS[precision]
    flows = [results[name] for results in both[CASES[name]["ranks"]].result()]
    flow = flows[0]
    assert flow.steps.tolist() == list(recorder_worker.RECORDED)
    layers, blocks = reference[1]
    assert_layers(flow, 0, layers, first, floor, share)
    for field, values in blocks.items():
        atol = share if field in SHARES else first * blocks["output_std"].max() if field == "output_mean" else 0.0
        assert np.allclose(getattr(flow, field)[0], values, rtol=first, atol=atol), field
        assert np.isnan(getattr(flow, field)[1]).all(), field
    if precision != "fp16":
        assert_layers(flow, 1, reference[3][0], later, floor, share)
    for field in (*LAYER_FIELDS, *BLOCK_FIELDS):
        assert np.array_equal(getattr(flows[0], field), getattr(flows[-1], field), equal_nan=True), f"{field} differs between ranks"


def test_every_engine_records_the_same_after_a_change_of_the_loss_scale(both: Any) -> None:
    """fp16's second step overflows everywhere, the third is scaled by half: every engine against torch's own GradScaler."""
    flows = {case["name"]: both[case["ranks"]].result()[0][case["name"]] for case in CASES.values() if case["precision"] == "fp16"}
    reference = next(flow for name, flow in flows.items() if name.startswith("torch"))
    expected = {name: getattr(reference, name)[1].astype(np.float64) for name in LAYER_FIELDS}
    _, band, share, floor = BANDS["fp16"]
    for flow in flows.values():
        assert flow.meta["loss_scale"] == 2.0**15
        assert_layers(flow, 1, expected, band, floor, share)


def test_the_reference_has_zeros_and_dead_units(reference: Any) -> None:
    """Else the shares would be compared with nothing."""
    layers, blocks = reference[1]
    assert layers["zeros"].max() > 0.1 and blocks["dead"].max() > 0 and 0.3 < blocks["saturated"].mean() < 0.7


def test_low_precision_was_low(both: Any) -> None:
    """The record of bf16 and of fp16 differs from float32's."""
    one, two = (both[ranks].result()[0] for ranks in (1, 2))
    flows = {name: flow for results in (one, two) for name, flow in results.items() if name in CASES}
    exact = flows["torch none fp32 1 keep 1"].l2[0]
    for name, flow in flows.items():
        assert np.allclose(flow.l2[0], exact, rtol=1e-5, atol=1e-8) == (CASES[name]["precision"] == "fp32"), name


def test_nan_on_any_rank_is_nan_on_all(both: Any) -> None:
    """gloo's maximum keeps or drops it, as the order has it."""
    for results in both[2].result():
        assert np.array_equal(results["maxima with NaN"], [np.nan, np.nan, 4.0], equal_nan=True)
