"""Spaces of sweeps: what is typed in a file is what is trained, and every mistake in one is said with its place before anything starts."""

import math
from pathlib import Path

import pytest

from deepscale import config
from deepscale.errors import UsageError
from deepscale.models import registry
from deepscale.parsing import Every
from deepscale.sweeps import space, values
from deepscale.sweeps.space import Range, Space, Trial


def read(folder: Path, text: str, *overrides: str, **keys: str) -> Space:
    path = folder / "my.yaml"
    path.write_text(text)
    return space.read(path, overrides, keys)


def refused(folder: Path, text: str, *overrides: str, **keys: str) -> str:
    with pytest.raises(UsageError) as caught:
        read(folder, text, *overrides, **keys)
    return str(caught.value).replace(f"{folder}/", "")


def points(own: Space) -> list[str]:
    return [trial.label for trial in space.trials(own)]


def test_a_file_is_trained_as_it_is_typed(tmp_path: Path) -> None:
    """The traps of YAML 1.1: words for switches, numbers that are words to it, none, octal numbers."""
    text = """
        question: What do the texts mean?
        fixed:
          augment: off
          async-save: auto
          download: no
          layerscale_init: 1e-6
          blocks: [1, 1, 5, 1]
          max_steps: 010
          eval_images: 1_000
        grid: {segment: [none, 4], weight_decay: [1e-6, 0.10]}
        seeds: [0, 1]
        metric: val/loss
        """
    own = read(tmp_path, text)
    assert (own.name, own.question, own.metric, own.mode) == ("my", "What do the texts mean?", "val/loss", "min")
    assert own.axes == ("segment", "weight_decay") and own.fixed["layerscale_init"] == "1e-6"
    every = space.trials(own)
    assert every[0] == Trial(1, {"segment": "none", "weight_decay": "1e-6", "seed": "0"})
    assert every[0].label == "segment=none weight_decay=1e-6 seed=0" and every[0].folder == "001-segment=none_weight_decay=1e-6_seed=0"
    assert [trial.number for trial in every] == list(range(1, 9))
    assert [trial.settings["seed"] for trial in every] == ["0"] * 4 + ["1"] * 4  # a sweep that is cut off has compared every point
    arguments = space.training_arguments(own, every[7].settings)
    assert {"--no-augment", "--no-download"} <= set(arguments) and "--async-save" not in arguments
    expected = {"augment": False, "download": False, "layerscale_init": 1e-6, "blocks": (1, 1, 5, 1), "max_steps": 10, "eval_images": 1000}
    assert config.differing(config.parse(arguments)) == expected | {"segment": 4, "weight_decay": 0.1, "seed": 1}


def test_points_that_train_the_same_can_be_left_out(tmp_path: Path) -> None:
    text = """
        question: Does the shape of gamma matter?
        grid: {layerscale_init: [none, 0, 1e-6], layerscale_shape: [scalar, channel]}
        without: [{layerscale_init: none, layerscale_shape: channel}, {layerscale_init: 0.0}]
        """
    with pytest.raises(UsageError, match=r"without has layerscale_init: 1, which is not in the grid"):
        read(tmp_path, text.replace("0.0}", "1}"))
    left = ["layerscale_init=none layerscale_shape=scalar", "layerscale_init=1e-6 layerscale_shape=scalar"]
    assert points(read(tmp_path, text)) == [f"{label} seed=0" for label in [*left, "layerscale_init=1e-6 layerscale_shape=channel"]]
    assert points(read(tmp_path, text, "--layerscale-init", "none")) == ["layerscale_shape=scalar seed=0"]
    assert "my.yaml: without leaves nothing to train" in refused(tmp_path, text, "--layerscale-init", "0")


def test_what_is_typed_wins_over_the_file(tmp_path: Path) -> None:
    text = "question: Which?\nfixed: {depth: 1004, augment: true}\ngrid: {activation: [gelu, tanh], norm: [layernorm, none]}\nseeds: [0, 1, 2]\n"
    own = read(tmp_path, text, "--depth", "26", "--norm", "none", "--no-augment", "--blocks", "1,1,5,1", seeds="4,5")
    assert own.fixed == {"depth": "26", "augment": "false", "norm": "none", "blocks": "1,1,5,1"} and list(own.grid) == ["activation"]
    assert points(own) == [f"activation={name} seed={seed}" for seed in (4, 5) for name in ("gelu", "tanh")]
    assert read(tmp_path, text, "--seed", "7").seeds == (7,)
    assert "the sweep itself" in refused(tmp_path, text, "--run-name", "mine")
    assert "--search: search 'deep' is not known; possible: grid" in refused(tmp_path, text, search="deep")


SEARCHED = """
question: Which learning rate?
grid: {lr: [1e-4, 1e-2], activation: [gelu, tanh]}
ranges: {lr: {low: 1e-4, high: 1e-2, log: true}, batch_size: {low: 8, high: 64}}
search: random
samples: 40
scheduler: asha
"""


def test_random_search_draws_from_ranges_and_lists_and_the_same_each_time(tmp_path: Path) -> None:
    own = read(tmp_path, SEARCHED)
    assert own.ranges == {"lr": Range(1e-4, 1e-2, log=True), "batch_size": Range(8, 64, whole=True)}
    assert list(own.grid) == ["activation"] and own.axes == ("activation", "lr", "batch_size") and own.scheduler == "asha"
    every = [trial.settings for trial in space.trials(own)]
    assert every == [trial.settings for trial in space.trials(read(tmp_path, SEARCHED))] and len(every) == 40
    assert every[:10] == [trial.settings for trial in space.trials(read(tmp_path, SEARCHED, samples="10"))]
    rates, batches = [float(settings["lr"]) for settings in every], [int(settings["batch_size"]) for settings in every]
    assert min(rates) >= 1e-4 and max(rates) <= 1e-2 and {settings["activation"] for settings in every} == {"gelu", "tanh"}
    assert 0.25 < sum(rate < 1e-3 for rate in rates) / 40 < 0.75  # evenly in the logarithm: half of them below the middle
    assert 8 <= min(batches) < 20 and 50 < max(batches) <= 64
    drawn = read(tmp_path, SEARCHED + "seeds: [1, 2]\n")
    assert len({trial.label for trial in space.trials(drawn)}) == 80


def test_one_file_is_a_grid_and_a_search_over_the_same_settings(tmp_path: Path) -> None:
    text = SEARCHED.replace(", batch_size: {low: 8, high: 64}", "")
    grid = read(tmp_path, text, search="grid")
    assert (grid.ranges, grid.samples) == ({}, None)
    assert points(grid) == [f"lr={lr} activation={name} seed=0" for lr in ("1e-4", "1e-2") for name in ("gelu", "tanh")]
    optuna = read(tmp_path, text, search="optuna")
    assert space.trials(optuna) == [] and optuna.samples == 40
    settings = space.settings_of(optuna, {"activation": "gelu", "lr": 0.0012345678})
    assert settings == {"activation": "gelu", "lr": "0.001235", "seed": "0"}
    assert space.settings_of(optuna, {"activation": "gelu", "lr": math.nextafter(1e-2, 1)})["lr"] == "0.01"


def test_a_grid_is_typed_without_a_file() -> None:
    own = space.of_axes("sweep", ["layerscale-init=0,0.01,1", "skip=identity"], ["--depth", "26"])
    assert points(own) == [f"layerscale_init={gamma} skip=identity seed=0" for gamma in ("0", "0.01", "1")]
    assert own.fixed == {"depth": "26"} and own.name == "sweep"
    for axes, said in ((["lr"], "--grid lr is not a setting and its values"), (["lr=a"], "--grid lr=a: lr: 'a' is not a number from 0")):
        with pytest.raises(UsageError, match=said):
            space.of_axes("sweep", axes)


def test_every_setting_is_typed_back_as_it_was_read() -> None:
    given = config.Config().replace(blocks=(1, 1, 5, 1), time_budget=90.0, augment=False, checkpoint_every=Every(steps=3))
    for name, chosen in config.flat(given).items():
        if name in values.KNOWN and name != "deepspeed_config":  # which has no word for its default, none
            text = values.text_of(name, chosen)
            assert values.value(name, text) == chosen
            network = next((known for known in registry.MODELS if name not in registry.unknown(known)), "")  # that has the setting
            assert config.flat(config.parse([*(() if name == "model" else ("--model", network)), *values.arguments(name, text)]))[name] == chosen


SPACES = Path(__file__).parent.parent / "tune" / "spaces"
TRIALS = {"components": 48, "depth": 24, "inits": 60, "layerscale": 39, "search": 16, "small": 16}


@pytest.mark.parametrize("name", TRIALS)
def test_the_repositorys_spaces_are_what_their_names_say(name: str) -> None:
    path = SPACES / f"{name}.yaml"
    assert path.read_text().startswith("# "), "a comment on the question"
    own = space.read(path)
    every = space.trials(own)
    assert len(every) == TRIALS[name] and own.question.endswith("?")
    settings = [config.parse(space.training_arguments(own, trial.settings)) for trial in every]
    assert len(set(settings)) == len(every)
    networks = [(s.model, s.data.batch_size, s.recipe.seed, s.recipe.lr, s.recipe.weight_decay) for s in settings]
    assert len(set(networks)) == len(every), "two trials train the same"
    if name == "depth":
        assert [str(s.model.built_depth) for s in settings[:8]] == list(own.grid["depth"]), "depths that can be built"


def test_the_repository_has_no_other_spaces() -> None:
    assert {path.stem for path in SPACES.iterdir()} == TRIALS.keys()


def test_the_searched_space_is_its_grids() -> None:
    """Optuna draws from the ranges whose ends the grid has, and trains as many points."""
    grid, drawn = space.read(SPACES / "search.yaml"), space.read(SPACES / "search.yaml", keys={"search": "optuna", "scheduler": "asha"})
    assert drawn.axes == grid.axes and not drawn.grid and drawn.samples == len(space.trials(grid)) and drawn.scheduler == "asha"
    for name, bounds in drawn.ranges.items():
        values_there = [float(text) for text in grid.grid[name]]
        assert (bounds.low, bounds.high) == (min(values_there), max(values_there)) and bounds.log


Q = "question: Which?\n"
MISTAKES = {
    "": "my.yaml holds no `key: value`",
    "- a\n": "my.yaml holds no `key: value`",
    "question: [a\n": "my.yaml line 2 is not YAML",
    "question: a\n---\nquestion: b\n": "my.yaml line 2 is not YAML",
    "a: &a {b: *a}\n": "my.yaml line 1 is nested more deeply",
    "grid: {lr: [1]}\n": "my.yaml asks no question",
    Q: "my.yaml varies nothing",
    Q + "gird: {lr: [1]}\n": "my.yaml line 2: key 'gird' is not known; possible: question, fixed, grid,",
    Q + "grid: {lr: []}\n": "my.yaml line 2: the axis lr is empty",
    Q + "grid:\n": "my.yaml line 2: grid names no settings",
    Q + "grid: {lr: 1}\n": "my.yaml line 2: lr is an axis and takes a list",
    Q + "grid: {rate: [1]}\n": "my.yaml line 2: setting 'rate' is not known; possible: depth, blocks,",
    Q + "grid:\n  lr: [1]\n  norm:\n  - none\n  - never\n": "my.yaml line 6: norm: 'never' is not known; possible: layernorm,",
    Q + "grid: {max_steps: [1.5]}\n": "my.yaml line 2: max_steps: '1.5' is not a whole number",
    Q + "grid: {augment: [maybe]}\n": "my.yaml line 2: 'maybe' is neither on nor off",
    Q + "grid: {lr: [{low: 1}]}\n": "my.yaml line 2: lr takes one value",
    Q + "grid: {lr: [0.1, 1e-1]}\n": "my.yaml line 2: lr has 0.1 and 1e-1, which are the same",
    Q + "grid: {lr: [1]}\ngrid: {norm: [none]}\n": "my.yaml line 3 says grid again",
    Q + "grid: {layerscale-shape: [scalar], layerscale_shape: [channel]}\n": "my.yaml line 2: layerscale_shape is there twice",
    Q + "grid: {lr: [1]}\nfixed: {lr: 1}\n": "my.yaml: lr is fixed and varied",
    Q + "grid: {seed: [1]}\n": "my.yaml line 2: seed is an axis of its own",
    Q + "grid: {lr: [1]}\nseeds: 3\n": "my.yaml line 3: seeds takes a list",
    Q + "grid: {lr: [1]}\nseeds: [1, x]\n": "my.yaml line 3: seed: 'x' is not a whole number",
    Q + "grid: {lr: [1]}\nseeds: [1, 1]\n": "my.yaml line 3: seed 1 is there twice",
    Q + "grid: {lr: [1]}\nmetric: test/accuracy\n": "my.yaml line 3: metric 'test/accuracy' is not known; possible: val/accuracy, val/loss",
    Q + "grid: {lr: [1]}\nconverged: 50\n": "my.yaml line 3: converged is an accuracy from 0 to 1",
    Q + "grid: {skip: [identity, none]}\nfixed: {layerscale_init: 0}\n": "my.yaml, skip=none seed=0: --skip none with --layerscale-init 0",
    Q + "ranges: {lr: {low: 1, high: 2}}\n": "my.yaml: lr has a range and no values for a grid",
    Q + "ranges: {lr: [1, 2]}\nsearch: random\n": "my.yaml line 2: the range of lr has low, high",
    Q + "ranges: {lr: {low: 2, high: 1}}\nsearch: random\n": "my.yaml line 2: lr ranges from 2 to 1",
    Q + "ranges: {lr: {low: 0, high: 1, log: yes}}\nsearch: random\n": "my.yaml line 2: lr ranges from 0 on, which has no logarithm",
    Q + "ranges: {lr: {low: -1, high: 1}}\nsearch: random\n": "my.yaml line 2: lr: -1 is not a number from 0",
    Q + "ranges: {width: {low: auto, high: 8}}\nsearch: random\n": "my.yaml line 2: low of width is auto",
    Q + "ranges: {norm: {low: none, high: 8}}\nsearch: random\n": "my.yaml line 2: norm is no number",
    Q + "ranges: {lr: {low: 1, high: 2}}\nsearch: random\n": "my.yaml: search: random draws points, and samples does not say how many",
    Q + "ranges: {lr: {low: 1, high: 2}}\nsearch: random\nsamples: 0\n": "my.yaml line 4: samples: 0 is not a whole number from 1",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_said_with_its_place(tmp_path: Path, text: str) -> None:
    assert MISTAKES[text] in refused(tmp_path, text)


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "there.yaml").write_text("question: Which?\n")
    for name in ("missing.yaml", "."):
        with pytest.raises(UsageError, match=r"cannot be read .*there are: .*there\.yaml"):
            space.read(tmp_path / name)
    (tmp_path / "binary.yaml").write_bytes(b"question: \xff\xfe\n")
    with pytest.raises(UsageError, match="is not a text"):
        space.read(tmp_path / "binary.yaml")
