"""Checks over the state of an engine, for graded cells."""
