"""The native CPU kernel: C++ built on the user's machine, with a path per instruction set."""
