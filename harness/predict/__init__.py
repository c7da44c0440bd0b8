"""What a trained model says to pictures that nobody labelled, on disk."""
