"""Makes `from_pretrained` rebuild pruned models, with this package and on machines without it."""

from . import from_pretrained as from_pretrained
