"""An experiment of variants and seeds as its YAML file tells it, and the runs (children) that it
asks for.

NAME.yaml -> Ablation -> one Child for each variant and seed, in OUT/VARIANT/seed-N. The form for
two CPU cores is an experiment of its own, NAME_offline.yaml beside it. A file in full:

    name: bridges                      # OUT is runs/ablations/NAME unless --out says otherwise
    question: Which bridge is best?    # the report's first sentence
    base: demo                         # a config: a file, or the name of a shipped one
    overrides: [train.epochs=1]        # for every variant, before its own
    seeds: [0, 1, 2]                   # these, where the file names none
    variants:
      qformer:
        expected: the best             # written before the first run
      linear:
        expected: worse, nothing picks among the patches
        below: qformer                 # the same as a claim, which the report tests
        overrides: [model.bridge.kind=linear]
    pictures: [runs/demo/shards/test]  # where data.test holds features: sets with its images
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import model_validator

from harness.config.load import find, read_yaml, validated
from harness.config.load import load as load_config
from harness.config.schema import Config, NonNegative, Section
from harness.errors import ConfigError

FILES = "configs/ablations"

# files of a child's folder
CONFIG = "config.yaml"
LOG = "log.txt"
SCORES = "evaluation/scores.json"  # there when the child is finished

# in an override: the run of the variant `after` with the same seed, whose model is taken
MODEL = "<model>"


class Variant(Section):
    """One way to do it: overrides on the base config, and what is expected of it."""

    expected: str  # in words; below, above and like say it as a claim to be tested
    below: str | None = None  # it scores lower than that variant
    above: str | None = None  # it scores higher
    like: str | None = None  # no difference is expected
    overrides: tuple[str, ...] = ()  # after those of the file
    base: str | None = None  # in place of the file's
    after: str | None = None  # that variant is run first; <model> in an override is its folder


class Ablation(Section):
    """A file of configs/ablations."""

    name: str
    question: str
    base: str
    overrides: tuple[str, ...] = ()
    seeds: tuple[NonNegative, ...] = (0, 1, 2)
    variants: dict[str, Variant]
    pictures: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _names_are_known(self) -> Ablation:
        if not self.variants or not self.seeds:
            raise ValueError("expected at least one variant and one seed")
        earlier: set[str] = set()
        for name, variant in self.variants.items():
            for key in ("below", "above", "like", "after"):
                other = getattr(variant, key)
                known = earlier if key == "after" else self.variants.keys() - {name}
                if other is not None and other not in known:
                    which = "an earlier variant" if key == "after" else "another variant"
                    raise ValueError(
                        f"variants.{name}.{key} is {other!r}, expected {which} of the file"
                    )
            earlier.add(name)
        return self


@dataclass(frozen=True)
class Child:
    """One variant with one seed: a run of its own in OUT/VARIANT/seed-N."""

    variant: str
    seed: int
    out: Path
    base: str
    overrides: tuple[str, ...]
    after: Path | None = None  # the folder of the run whose model it starts from

    @property
    def finished(self) -> bool:
        return (self.out / SCORES).is_file()

    def config(self) -> Config:
        return load_config(self.base, self.overrides)


def load(file: str | Path, offline: bool = False) -> Ablation:
    """Returns the experiment of a file, or of a shipped one by its name; with `offline` that of
    the file NAME_offline.yaml beside it. Raises ConfigError.
    """
    found = find(file, FILES)
    beside = found.with_stem(f"{found.stem}_offline")
    document = read_yaml(found)
    if "offline" in document:
        raise ConfigError(
            f"{found}: the section offline is a file of its own now: write the whole experiment "
            f"with what it changes into {beside}, where --offline finds it, and take it out here"
        )
    if not offline:
        return validated(Ablation, document, found)
    if not beside.is_file():
        raise ConfigError(f"{found}: --offline runs {beside}, and there is no such file")
    return load(beside)


def children_of(
    ablation: Ablation, out: Path, overrides: Sequence[str], seeds: Sequence[int]
) -> list[Child]:
    """Returns all variants with the first seed, then with the next: what is there early compares
    all of them.
    """
    return [
        Child(
            variant=name,
            seed=seed,
            out=out / name / f"seed-{seed}",
            base=variant.base or ablation.base,
            overrides=(
                "evaluation.look_images=0",  # a page for each, but no minute of maps
                *ablation.overrides,
                *variant.overrides,
                *overrides,
                f"name={ablation.name}-{name}-{seed}",
                f"seed={seed}",
                f"out={out / name / f'seed-{seed}'}",
            ),
            after=out / variant.after / f"seed-{seed}" if variant.after else None,
        )
        for seed in seeds
        for name, variant in ablation.variants.items()
    ]
