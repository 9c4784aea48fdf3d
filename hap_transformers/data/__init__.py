"""Tasks, their metrics, and the examples that are scored and refitted on."""
