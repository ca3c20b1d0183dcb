"""Segmenters, discriminators, generators, and where their weights come from."""
