"""Decides what to remove: budgets, measured latency, and the choice itself."""
