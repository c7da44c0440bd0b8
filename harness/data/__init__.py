"""From records to batches: prompts, decoded images, features made before, collation."""
