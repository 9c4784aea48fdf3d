"""Runs the study. The functions lie in other modules: spawned workers cannot import them from `__main__`."""

import sys

from .run import main


try:
    main()
except (ValueError, OSError, ModuleNotFoundError) as error:
    sys.exit(f"compare_glue: {error}")
