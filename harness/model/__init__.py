"""The model: frozen vision tower, bridge, language model."""
