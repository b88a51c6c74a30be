"""Georeferenced scenes of any size: reading, tiles, fusion, writing."""
