"""What the README tells a reader to type is understood, and what it points to is there."""

import re
import shlex
import textwrap
from pathlib import Path

import pytest

from deepscale import cli, config
from deepscale.errors import UsageError
from deepscale.gradflow import Recorder
from deepscale.sweeps import command, space

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
LINES = [words for block in BLOCKS for line in block.splitlines() if (words := shlex.split(line, comments=True))]
TRAININGS = [words[words.index("deepscale/train.py") + 1 :] for words in LINES if "deepscale/train.py" in words]
TARGETS = [words[1] for words in LINES if words[0] == "make"]


def test_every_training_command_is_understood() -> None:
    """Each line's settings against the parser of the command itself; --help aside, which prints."""
    assert len(TRAININGS) >= 5
    for words in TRAININGS:
        if "--help" not in words:
            assert config.parse(words).model.built_depth >= 8


def test_subcommands_exist() -> None:
    """Every `deepscale NAME` in the text or in a block, against the table of the command."""
    named = set(re.findall(r"`deepscale ([a-z]+)", README)) | {words[1] for words in LINES if words[0] == "deepscale"}
    assert named
    assert named <= set(cli.COMMANDS)


def test_make_targets_and_files_exist() -> None:
    """Targets against the Makefile, linked and listed files against the repository."""
    makefile = (ROOT / "Makefile").read_text()
    assert TARGETS
    assert all(re.search(rf"^{target}:", makefile, flags=re.M) for target in TARGETS)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links
    assert all((ROOT / link).exists() for link in links), links


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_links_of_the_pages_lead_somewhere(page: str) -> None:
    """Files that a page of docs/ links to, and headings in it, against the repository."""
    text = (ROOT / "docs" / page).read_text()
    headings = {re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in text.splitlines() if line.startswith("#")}
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    wrong = [link for link in links if not (link[1:] in headings if link.startswith("#") else (ROOT / "docs" / link.partition("#")[0]).exists())]
    assert not wrong


def test_options_named_in_the_text_exist() -> None:
    """Every `--option` in backticks, against the settings; those of other commands are named here."""
    others = {"--ops-dir", "--num_gpus", "--save", "--out", "--backend-store-uri", "--host", "--json", "--ranks"}
    training = config.parser("", "")
    config.add_arguments(training, *config.GROUPS)
    known = {option for one in (training, command._parser()) for action in one._actions for option in action.option_strings}
    named = {option for code in re.findall(r"`([^`\n]+)`", README) for option in re.findall(r"(?<![\w-])--[a-z][a-z_-]+", code)}
    assert named
    assert named - others <= known, named - others - known


def test_every_sweep_is_understood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each line that starts one, against the command's own parser and the file of the space; and the space that is shown."""
    monkeypatch.chdir(ROOT)
    sweeps = [words[words.index("tune/sweep.py") + 1 :] for words in LINES if "tune/sweep.py" in words]
    assert len(sweeps) >= 5
    for words in sweeps:
        given, typed = command._parser().parse_known_args(words)
        asked = command._space(given, typed)
        assert asked.question and (space.trials(asked) or asked.search == "optuna")
    (example,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.S)
    (tmp_path / "mine.yaml").write_text(example)
    assert len(space.trials(space.read(tmp_path / "mine.yaml", [], {}))) == 12


def test_no_placeholder_is_left() -> None:
    """The README's numbers are filled in."""
    assert "@@" not in README


def test_unknown_subcommand_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong name ends with exit code 2 and one sentence; no name prints all."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["trian"])
    assert stopped.value.code == UsageError.exit_code
    assert "'trian' is not known; possible: data, prepare" in capsys.readouterr().err
    cli.main([])
    assert all(name in capsys.readouterr().out.split() for name in ("bench",))


def test_the_recorders_example_is_that_of_its_docstring() -> None:
    """A test runs the docstring's; the README repeats it word for word."""
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert textwrap.indent(block.strip(), " " * 8) in (Recorder.__doc__ or "")
