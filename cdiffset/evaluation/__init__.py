"""Evaluation of images and their uncertainty maps against the true EO."""
