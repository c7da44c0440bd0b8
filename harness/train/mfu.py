"""Model FLOPs utilisation: the arithmetic that a step needs, as a share of what the GPUs could do
meanwhile (Chowdhery et al. 2022, PaLM, appendix B).

Counted on the run's first batches by plan/skeleton.py, so of what a step computes indeed: frozen
parts without the gradients of their weights, the encoder, which has none at all, forward only.
Work done twice (activation checkpointing) counts once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harness.config.schema import Config
from harness.machine.devices import peak_teraflops
from harness.machine.precision import Precision
from harness.model.batch import Batch
from harness.model.vlm import VisionLanguageModel
from harness.train.state import Run


def flops_of_an_image(
    config: Config, precision: Precision, model: VisionLanguageModel, batches: Sequence[Batch]
) -> float:
    """Returns the floating-point operations that training takes for an image of these batches, its
    texts included. Takes seconds. Raises ConfigError for a base whose config.json has gone.
    """
    from harness.plan.skeleton import Skeleton
    from harness.plan.workload import Sizes

    skeleton = Skeleton(config, precision, None if model.vision else model.config.encoder)
    flops = 0
    for batch in batches:
        passed = skeleton.run(
            Sizes.of(batch), batch.images, checkpointing=False, gradients_held=False
        )
        flops += sum(passed.flops.values())
    return flops / sum(batch.images for batch in batches)


class Utilisation:
    """The MFU of one run, on the main process; `unknown` says why there is none."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.unknown = ""
        self._flops = 0.0  # of an image
        engine = run.engine
        name = "a CPU"
        if engine.device.type == "cuda":
            name = torch.cuda.get_device_name(engine.device)
        peak = peak_teraflops(name, engine.precision.name)
        if peak is None:
            self.unknown = f"no MFU: the peak of {name} is not known"
        self._peak = (peak or 0.0) * 1e12 * engine.world_size

    def count(self, batches: Sequence[Batch]) -> None:
        """Counts, once, what an image takes; `batches`: those of a step, which may have none."""
        run = self.run
        if self._flops or self.unknown or not run.engine.is_main:
            return
        if not any(batch.images for batch in batches):
            return
        try:
            self._flops = flops_of_an_image(run.config, run.engine.precision, run.model, batches)
        except Exception as error:  # whatever fails, a run does not end for its speedometer
            reason = " ".join(str(error).split())
            self.unknown = f"no MFU: the operations of a step could not be counted ({reason})"

    def of(self, images_per_second: float) -> float | None:
        """Returns the utilisation at that speed, all ranks together; None where it is unknown."""
        return self._flops * images_per_second / self._peak if self._flops else None
