"""Reports: one HTML file with its pictures inside, which opens anywhere and needs no network.

A report is sections of blocks; ``page.html`` and ``blocks.html`` beside this file say how they look.
"""

from vistok.utils.report.blocks import (
    REPORT_FILE,
    Animation,
    Block,
    Commands,
    Facts,
    Folded,
    Notes,
    Paragraph,
    Picture,
    Score,
    ScoreTable,
    Section,
    Slider,
    Table,
    cell_text,
    write_report,
)
from vistok.utils.report.charts import Chart, Charts, Line

__all__ = [
    "REPORT_FILE",
    "Animation",
    "Block",
    "Chart",
    "Charts",
    "Commands",
    "Facts",
    "Folded",
    "Line",
    "Notes",
    "Paragraph",
    "Picture",
    "Score",
    "ScoreTable",
    "Section",
    "Slider",
    "Table",
    "cell_text",
    "write_report",
]
