"""The families of image generators, a folder each, behind the interface in `base`."""
