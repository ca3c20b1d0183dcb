"""UDAS: segmentation networks for real pictures from synthetic labels and a few real ones."""

__version__ = "0.1.0"
