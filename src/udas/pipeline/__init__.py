"""Stages, how they are chained, and what is done again after a change."""
