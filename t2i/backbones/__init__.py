"""Backbone families, one file each, behind the interface in `base`."""
