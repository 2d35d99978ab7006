"""Use of the machine over a run, under the names MLflow's "System metrics" tab shows (`system/...`).

MLflow's own sensors measure; its SystemMetricsMonitor is not used, because it writes to the store from a thread of its own, and its end
waits without limit for a store that hangs.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any

INTERVAL_S = 10.0


class SystemSampler:
    """Logs CPU, memory, disk, network and, where NVIDIA's library is installed, GPU use every `INTERVAL_S` seconds and once at the end."""

    def __init__(self, log: Callable[[Mapping[str, float], int], None], interval_s: float = INTERVAL_S) -> None:
        self._log = log
        self._interval_s = interval_s
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="deepscale-system-metrics")

    def start(self) -> None:
        """Starts measuring."""
        self._thread.start()

    def stop(self) -> None:
        """Measures once more and ends; waits at most 2 s."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(2.0)

    def _work(self) -> None:
        sensors = _sensors()
        # The first reading only starts the clocks of the CPU, disk and network counters.
        _read(sensors)
        step = 0
        while True:
            ended = self._ending.wait(self._interval_s)
            values = _read(sensors)
            if values:
                self._log(values, step)
            step += 1
            if ended:
                return


def _sensors() -> list[Any]:
    try:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    except ImportError:
        # psutil is missing: a run without system metrics.
        return []
    sensors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    try:
        sensors.append(GPUMonitor())
    except (ImportError, RuntimeError):
        # No NVIDIA library or no GPU.
        return sensors
    return sensors


def _read(sensors: list[Any]) -> dict[str, float]:
    values: dict[str, float] = {}
    for sensor in sensors:
        sensor.collect_metrics()
        values.update({f"system/{key}": value for key, value in sensor.aggregate_metrics().items()})
        sensor.clear_metrics()
    return values
