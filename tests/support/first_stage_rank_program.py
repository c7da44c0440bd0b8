"""A first stage on several processes: argument 1 is a folder with models and sets."""

import sys
from pathlib import Path

from first_stage_toy import run_config
from harness.train.run import run

if __name__ == "__main__":
    run(run_config(Path(sys.argv[1]), "two", ["itc", "lm"], epochs=1, evaluate_every=100))
