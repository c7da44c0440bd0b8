"""A trained run -> a folder that transformers, peft and the hub understand, proven equal to it."""
