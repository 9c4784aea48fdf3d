"""The main job of language models."""
