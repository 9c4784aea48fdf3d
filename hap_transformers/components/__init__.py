"""What can be removed from a model, and how modules shrink; imports only torch, transformers and itself."""

from . import heads as heads
from . import neurons as neurons
