"""`HapTrainer`: `transformers.Trainer` that can also score, prune and recover."""
