"""HTTP faces of the engine."""
