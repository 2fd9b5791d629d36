"""Families of image generators, one folder each, behind the interface in `base`."""
