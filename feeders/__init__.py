"""Datasets of SAR-EO pairs."""
