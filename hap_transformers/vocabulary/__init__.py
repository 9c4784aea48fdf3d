"""Trimming of the vocabulary: tokens that the texts never use leave the tokenizer and the model."""
