"""Predictions, official scores and the image-use evidence. Never imports train."""

FOLDER = "evaluation"  # of a run: scores.json, and predictions in the official formats
DEV = "dev"  # in it: what the last evaluation in training left
