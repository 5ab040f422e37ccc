"""The studies: finding the notebooks, running them on a model, and reporting what their asserts said.

A study is a notebook whose first cell starts with `# Title` and has a line that starts with `**Question.**`, with one
`MODEL = "..."` cell (tagged `parameters`), and with an `assert` for every claim. The figure on its card is the first
one, or the one of the cell tagged `card`.
"""

from interp.studies.discovery import Study, find_study, list_studies, studies_dir
from interp.studies.report import write_report
from interp.studies.running import Check, StudyRun, run_studies, run_study

__all__ = [
    "Check",
    "Study",
    "StudyRun",
    "find_study",
    "list_studies",
    "run_studies",
    "run_study",
    "studies_dir",
    "write_report",
]
