"""What can be removed from a model, and how modules shrink; imports only torch, transformers and itself."""

from . import embedding_dims as embedding_dims  # isort: skip
from . import heads as heads  # isort: skip
from . import head_dims as head_dims  # isort: skip
from . import neurons as neurons  # isort: skip
from . import channels as channels  # isort: skip
from . import layers as layers  # isort: skip
