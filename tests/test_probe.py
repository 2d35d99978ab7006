"""`deepscale gradflow`: probes against the plain network, what is compared with what, bad input, and the table of a run."""

from pathlib import Path

import numpy as np
import pytest
import torch

from deepscale import cli, gradflow
from deepscale.config import Config
from deepscale.errors import UsageError
from deepscale.gradflow import probe
from deepscale.gradflow.command import main
from deepscale.models.convnext import cross_entropy
from deepscale.models.reference import PlainConvNeXt
from deepscale.world import World
from tests.flows import made_up_flow

SMALL = ["--dataset", "synthetic", "--width", "8", "--patch-size", "4", "--batch-size", "16", "--threads", "1"]
HERE = World(0, 1, 0, 1, torch.device("cpu"))


def asked(**settings: object) -> Config:
    return Config().replace(dataset="synthetic", width=8, patch_size=4, batch_size=16, threads=1, device="cpu", **settings)


def quiet(line: str) -> None:
    """Says nothing."""


@pytest.mark.parametrize("settings", [{"activation": "tanh"}, {"skip": "none", "norm": "batchnorm"}, {"layerscale_init": 0.0}])
def test_a_probe_is_the_plain_networks_gradient(settings: dict[str, object]) -> None:
    """Two batches, recomputed, against p.grad of the plain network on the mean of the two losses."""
    (variant,) = probe.variants_of(asked(depth=26, seed=3, **settings), [])
    (found,) = probe.probe([variant], 2, quiet)
    _, take = probe.images_of(variant.config, 2, HERE, quiet)
    model = PlainConvNeXt(variant.config.model).initialise(3)
    for images, labels in take(16):
        (cross_entropy(model(images), labels) / 2).backward()
    for i, name in enumerate(found.flow.layer_names.tolist()):
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert found.flow.mean_abs[0, i] == pytest.approx(gradient.abs().mean().item(), rel=1e-3, abs=1e-9), name
    assert found.flow.steps.tolist() == [0]
    assert np.isfinite(found.flow.output_grad_l2).all()
    assert found.flow.meta["settings"]["layerscale_init"] == ("0.0" if settings.get("layerscale_init") == 0.0 else "none")


def test_compare_draws_and_says_every_variant(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four variants of 110 layers: a line each with its verdict and its signal, a record each, one figure, one page."""
    main(["probe", "--depth", "110", *SMALL, "--compare", "norm=layernorm,none", "skip=identity,none", "--out", "there"])
    said = capsys.readouterr()
    lines = dict(line.split(": ", 1) for line in said.out.splitlines()[:4])
    assert {label: line.split(":")[0] for label, line in lines.items()} == {
        "layernorm, skip identity": "healthy",
        "layernorm, skip none": "vanishing",
        "norm none, skip identity": "healthy",
        "norm none, skip none": "vanishing",
    }
    assert "exactly 0 from layer" in lines["norm none, skip none"]  # the signal dies
    assert "exactly 0" not in lines["layernorm, skip none"]
    assert "LayerScale gamma none" in said.err
    assert said.out.splitlines()[4:] == ["there/probe.png", "there/probe.html"]
    assert Path("there/probe.png").read_bytes()[:4] == b"\x89PNG"
    assert "layernorm, skip none" in Path("there/probe.html").read_text()
    records = {folder.parent.name: gradflow.load(folder) for folder in Path("there").glob("*/gradflow.npz")}
    assert set(records) == {"layernorm_skip_identity", "layernorm_skip_none", "norm_none_skip_identity", "norm_none_skip_none"}
    assert records["norm_none_skip_none"].meta["settings"]["norm"] == "none"


def test_the_limits_typed_are_those_it_is_judged_by(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first block's gradient is 0.2 of the last block's: healthy by default."""
    for limit, label in (("1e-4", "healthy"), ("0.9", "vanishing")):
        main(["probe", "--depth", "26", *SMALL, "--vanishing-ratio", limit, "--out", label])
        assert capsys.readouterr().out.startswith(f"{label}: ")
        main(["show", label])
        assert capsys.readouterr().out.splitlines()[-1].startswith(f"{label}: ")


def test_variants_are_all_combinations_in_order() -> None:
    """The labels say what differs, short; gamma is none unless it is told or compared."""
    found = probe.variants_of(asked(), ["activation=gelu,tanh", "--norm=layernorm,none"])
    assert [variant.label for variant in found] == ["gelu, layernorm", "gelu, norm none", "tanh, layernorm", "tanh, norm none"]
    assert [variant.config.model.activation for variant in found] == ["gelu", "gelu", "tanh", "tanh"]
    assert {variant.config.model.gamma_init for variant in found} == {None}
    told = probe.variants_of(asked(layerscale_init=0.5), ["drop-path=0,0.1,0"])
    assert [(variant.config.model.gamma_init, variant.config.model.drop_path) for variant in told] == [(0.5, 0.0), (0.5, 0.1)]
    gammas = probe.variants_of(asked(), ["layerscale_init=0,1e-6,none"])
    assert [variant.config.model.gamma_init for variant in gammas] == [0.0, 1e-6, None]


def test_variants_share_the_sizes_that_were_left_open() -> None:
    """Widths, patches and batches chosen for the deepest are those of all, but for what is compared; recomputation unless told."""
    settings = Config().replace(dataset="synthetic", device="cpu", depth=26, batch_size=8)
    info, _ = probe.images_of(settings, 1, HERE, quiet)
    deep = probe.plan_all(probe.variants_of(settings, ["depth=26,10001"]), 1, HERE, info)
    sizes = {(v.config.model.width, v.config.model.patch_size, v.config.data.batch_size, v.config.engine.activations) for v, _ in deep}
    assert len(sizes) == 1
    assert [variant.config.model.depth for variant, _ in deep] == [26, 10_001]
    wide = probe.plan_all(probe.variants_of(settings.replace(patch_size=4, activations="keep"), ["width=8,16"]), 1, HERE, info)
    assert [(variant.config.model.width, variant.config.engine.activations) for variant, _ in wide] == [(8, "keep"), (16, "keep")]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--compare", "actvation=gelu"], "axis 'actvation' is not known; possible: depth, model, width"),
        (["--compare", "activation=gelu,foo"], "--compare activation: 'foo' is not known; possible: gelu, relu"),
        (["--compare", "activation"], "'activation' is not an axis with values; type for example --compare activation=gelu,tanh"),
        (
            ["--compare", "skip=identity,none", "--layerscale-init", "0"],
            "the variant skip none is not possible: --skip none with --layerscale-init 0",
        ),
        (["--compare", "activation=gelu", "activation=tanh"], "names an axis twice"),
        (["--compare", "depth=26,7"], "--depth 7 is out of range"),
        (["--compare", "seed=0,1,2,3,4", "norm=layernorm,none,rmsnorm,batchnorm,none", "skip=identity,none"], "makes 40 variants"),
        (["--compare", "patch_size=1,8", "--width", "8"], "--patch-size 8 leaves nothing"),
        (["--batches", "0"], "--batches 0 is no number"),
        (["--batches", "10000"], "are more than the"),
        (["--out", "file/folder"], "cannot be made"),
    ],
)
def test_bad_input_is_a_sentence(in_tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    """Exit code 2, one sentence that says what is possible, and no network was built for it."""
    Path("file").touch()
    with pytest.raises(SystemExit) as ended:
        cli.main(["gradflow", "probe", "--dataset", "synthetic", "--device", "cpu", "--out", "out", *arguments])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert sentence in said.err.splitlines()[-1]
    assert said.out == ""
    assert not list(Path().glob("out/*"))


def test_show_lists_every_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row per record, with a dash for what is not defined, and the last verdict in words; an unknown command lists the known."""
    flow = made_up_flow(26, 4, gamma=0.0)
    flow.output_grad_l2[1, 0] = 0
    flow.output_grad_l2[2] = 0
    flow.save(tmp_path / "gradflow.npz")
    main(["show", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:-1]] == ["healthy", "vanishing", "vanishing", "healthy"]
    assert lines[3].split()[:3] == [str(flow.steps[2]), "-", "-"]
    assert lines[-1].startswith("healthy: the gradient at the first block's output is ")
    with pytest.raises(UsageError, match="'look' is not known; possible: probe, show"):
        main(["look"])
