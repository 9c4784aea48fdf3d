"""Closed-form refit of a pruned model: no labels, no gradient descent."""
