"""Trainers of language models, one file each, and the modules that they share."""
