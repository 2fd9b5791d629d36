"""The shapes world: everything that the kit does, offline, with scores that mean something."""
