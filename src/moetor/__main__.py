"""`python -m moetor` is the `moetor` command."""

import sys

from moetor.cli.main import main

sys.exit(main())
