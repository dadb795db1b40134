"""The parts of `builds`: the graph of stages, cache and reasons, contexts and sources, steps and their layers."""
