"""Runs side by side on one page: `python -m llqr_experiments.report RUN [RUN ...]`.

The page is one file that needs no network. Reading, drawing and writing are apart:

runs.py      `read` makes a `Run` of a folder
sections.py  runs of one kind; runs that differ by their seeds only
scores.py    what a run ends with, by kind: the columns of tables
canvas.py    colours, axes, legends
charts.py    `pictures` makes figures of runs
markup.py    style sheet, tables, cells
tables.py    summary, means over seeds, options that differ
page.py      `page` makes HTML of all of it
command.py   files and command line
"""

from llqr_experiments.report.canvas import COLORS, PHASES, color, dash
from llqr_experiments.report.charts import NAMES, Picture, pictures
from llqr_experiments.report.command import main, write
from llqr_experiments.report.page import page
from llqr_experiments.report.runs import (
    ABSENT,
    FILES,
    Point,
    Run,
    Translation,
    differences,
    read,
    status,
)
from llqr_experiments.report.sections import Section, same_but_seeds, sections

__all__ = [
    "ABSENT",
    "COLORS",
    "FILES",
    "NAMES",
    "PHASES",
    "Picture",
    "Point",
    "Run",
    "Section",
    "Translation",
    "color",
    "dash",
    "differences",
    "main",
    "page",
    "pictures",
    "read",
    "same_but_seeds",
    "sections",
    "status",
    "write",
]
