"""Predictions, official scores and the image-use evidence. Never imports train."""
