"""Measurements: each against the ceilings of the machine it ran on, and against its peers."""
