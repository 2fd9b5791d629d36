"""Rehearsals at real size: official layouts with random weights, and programs measured on them."""
