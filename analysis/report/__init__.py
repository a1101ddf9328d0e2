"""What runs did and learned, as one self-contained HTML page: `localsim report`, as a function."""

from localsim.analysis.report.page import SECTIONS, write_report

__all__ = ["SECTIONS", "write_report"]
