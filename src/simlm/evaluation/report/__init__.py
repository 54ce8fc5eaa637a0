"""The report of a run: metrics.json, report.md, report.html and the table for a terminal."""

from simlm.evaluation.report.page import write_pages
from simlm.evaluation.report.results import Results, Row, measure_rows
from simlm.evaluation.report.tables import terminal_table
from simlm.evaluation.report.verdicts import Verdict, verdicts

__all__ = ["Results", "Row", "Verdict", "measure_rows", "terminal_table", "verdicts", "write_pages"]
