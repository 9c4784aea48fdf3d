"""Makes `from_pretrained` rebuild pruned models, with this package and on machines without it."""
