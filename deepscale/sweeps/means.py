"""Mean and deviation over the trainings that differ in their seed alone."""

import statistics


class OverSeeds:
    """What has a metric's last value for each seed."""

    def values(self, metric: str) -> list[float]:
        """Last values of a metric, one for each seed that has been measured."""
        raise NotImplementedError

    def mean(self, metric: str) -> float | None:
        """Mean over the seeds; None where nothing was measured."""
        values = self.values(metric)
        return statistics.fmean(values) if values else None

    def deviation(self, metric: str) -> float | None:
        """Standard deviation over the seeds (of a sample: n - 1); None below two."""
        values = self.values(metric)
        return statistics.stdev(values) if len(values) > 1 else None
