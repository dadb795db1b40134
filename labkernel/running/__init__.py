"""The parts of `containers`: one container, its files, its changes, what is told of it and what holds it."""
