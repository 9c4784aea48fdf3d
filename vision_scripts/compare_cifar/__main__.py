"""Runs the study."""

import sys

from .run import main


try:
    main()
except (ValueError, OSError, ModuleNotFoundError) as error:
    sys.exit(f"compare_cifar: {error}")
