"""Groups, collectives and dispatchers."""
