"""The report of runs: one page that opens offline, and the files behind its figures.

    from deepscale.report import ReportRun, write_page, write_report

    write_report(runs, Path("report"))                             # report/index.html and report/runs/<id>/*
    write_page([run], Path("gradflow.html"), single_file=True)     # one run, one file

`deepscale report` collects runs from MLflow or from `gradflow.npz` files (collect.py) and writes the same.
"""

from deepscale.report.page import write_page, write_report
from deepscale.report.run import ReportRun

__all__ = ["ReportRun", "write_page", "write_report"]
