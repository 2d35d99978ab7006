"""What marks a trial's run in MLflow, and the words for how a trial ends. Knows neither Ray nor MLflow nor torch: a trial's worker loads this."""

from deepscale.sweeps.space import Space

FINISHED, STOPPED_EARLY, NON_FINITE, OUT_OF_MEMORY = "finished", "stopped_early", "non_finite", "out_of_memory"
ENDED = (FINISHED, STOPPED_EARLY, NON_FINITE, OUT_OF_MEMORY)  # results; whatever else ends a trial's start lets it be tried again
SWEEP, SPACE, TRIAL, TRIALS = "sweep", "space", "trial", "sweep_trials"
AXES, METRIC, MODE, CONVERGED = "sweep_axes", "sweep_metric", "sweep_mode", "sweep_converged"


def tags(sweep: str, space: Space, number: int, trials: int) -> dict[str, str]:
    """Of a trial's run, so that the sweep's table can be made of its runs alone. trials: how many are planned."""
    compared = {AXES: " ".join(space.axes), METRIC: space.metric, MODE: space.mode, CONVERGED: f"{space.converged:g}"}
    return {SWEEP: sweep, SPACE: space.name, TRIAL: str(number), TRIALS: str(trials), **compared}
