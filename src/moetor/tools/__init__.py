"""Tools for the people who work on Moetor: tiny models of every family, and the compatibility
sweep over them."""
