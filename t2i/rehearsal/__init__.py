"""Rehearsals at real size: random weights in official layouts, and measurements of programs."""
