"""The parts of `images` and `registries`: one image, how it arrives (pulls, bases) and leaves (pushes, removal)."""
