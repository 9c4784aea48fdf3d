"""Plans as data, and the removal of what they name."""
