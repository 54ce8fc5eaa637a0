"""Losses: torch only, pure functions."""
