"""Judging images and their uncertainty maps against the truth."""
