"""What `fuse` would do, from a model's configuration alone."""


def explain(): ...
