"""Makes plain `from_pretrained` rebuild pruned models, here and where this package is not installed."""
