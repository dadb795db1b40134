"""The parts of `networks`: one network, its settings, what is leaked; the mechanism is `net/`."""
