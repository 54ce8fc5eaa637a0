"""Training on transformers.Trainer."""
