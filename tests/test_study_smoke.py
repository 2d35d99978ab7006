"""Every study at smoke scale by the real command: toy, vgg and mlp whole, one row of each other."""

import json
from pathlib import Path

import pytest

from deepscale import cli
from deepscale.studies import stored
from deepscale.studies.study import SMOKE, STUDIES, load
from deepscale.sweeps.tags import FINISHED, NON_FINITE

WHOLE = ("toy", "vgg", "mlp")


@pytest.mark.parametrize("name", STUDIES[::-1])  # toy last: what rows are forked from imports what the first one needs
def test_a_study_runs_at_smoke_scale(name: str, in_tmp_path: Path) -> None:
    study = load(name)
    source = study.scale(SMOKE).sweep
    if source is not None and not (stored.results_folder() / source.folder).is_dir():
        pytest.skip(f"the sweep of {name} has not been run")
    cases = study.of_scale(SMOKE) if name in WHOLE else study.of_scale(SMOKE)[:1]
    only = [] if name in WHOLE else ["--only", cases[0].name]
    cli.main(["study", name, "--scale", SMOKE, "--seeds", "0", "--out", "pages", *only])
    assert f"\n# {study.title}\n" in "\n" + Path("pages", f"{name}-smoke.md").read_text()
    if source is None:
        rows = [json.loads(path.read_text()) for path in Path("studies", "smoke", name).glob("*.json")]
        assert {row["case"] for row in rows} == {case.name for case in cases}
        assert {row["outcome"] for row in rows} <= {FINISHED, NON_FINITE}
        assert all(row["numbers"] for row in rows)
