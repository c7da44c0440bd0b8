"""Does the answer come from the image? Counterfactuals and floors, and a verdict in words."""
