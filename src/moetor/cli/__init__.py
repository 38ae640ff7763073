"""The `moetor` command: one file per command, flags generated from its options dataclass."""
