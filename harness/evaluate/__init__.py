"""Predictions, official scores and the image-use evidence. Never imports train."""

FOLDER = "evaluation"  # of a run: scores.json, and predictions in the official formats
