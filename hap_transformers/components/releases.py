"""Every difference between releases of Transformers that the package reacts to."""

import transformers
from packaging import version


_TRANSFORMERS = version.parse(transformers.__version__)

TRANSFORMERS_4 = _TRANSFORMERS.major == 4

# The modules of ViT and its relatives got the names that language models use.
VIT_RENAMED = _TRANSFORMERS >= version.parse("5.9.0")
