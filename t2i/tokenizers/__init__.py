"""Images <-> codes."""
