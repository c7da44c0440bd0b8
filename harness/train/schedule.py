"""The learning rate as a pure function of the step: nothing to save, nothing that can run ahead.

A scheduler object prepared by Accelerate steps once per process, so that with two of them it is
done in half the time.
"""

import math

from harness.config.schema import TrainConfig


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Returns the rate of step 0, 1, ...: linear warm-up, then a cosine from the peak.

    The cosine ends at `final_learning_rate` times the peak.
    """
    warmup = math.ceil(config.warmup * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - warmup) / max(1, total_steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    end = config.final_learning_rate
    return config.learning_rate * (end + (1 - end) * cosine)
