"""Measures, significance tests, answer matching and the report. Needs neither torch nor transformers."""
