"""The shapes world: everything in the kit runs on it offline, and its scores are meaningful."""
