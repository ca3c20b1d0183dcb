"""What a run has to show: one self-contained HTML file."""

from udas.reporting.html import write_report

__all__ = ["write_report"]
