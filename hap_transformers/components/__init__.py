"""What can be removed from a model, and how modules shrink; imports only torch, transformers and itself."""
