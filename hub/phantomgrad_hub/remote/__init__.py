"""Checkpoints in repositories of the Hugging Face Hub: pull, push, card, and what can go wrong."""
