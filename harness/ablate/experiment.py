"""An experiment of variants and seeds as its YAML file tells it, and the runs (children) that it
asks for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, model_validator

from harness.config.load import find, read_yaml, validated
from harness.config.load import load as load_config
from harness.config.schema import Config, NonNegative, Section

SCORES = "evaluation/scores.json"  # of a child: there when it is finished


CONFIG, LOG = "config.yaml", "log.txt"


# in an override: the folder of the model that the variant `after` has trained with the same seed
MODEL = "<model>"


class Variant(Section):
    """One way to do it: overrides on the base config, and what is expected of it."""

    expected: str  # in words
    below: str | None = (
        None  # the same as a claim to be tested: its score lies below that of this variant
    )
    above: str | None = None
    like: str | None = None  # no difference is expected
    overrides: tuple[str, ...] = ()
    base: str | None = None  # none: the base of all
    after: str | None = (
        None  # starts from that variant's model: <model> in an override is its folder
    )


class Change(Variant):
    """What the offline form puts in the place of a variant's; a key that is left out stays as it
    is.
    """

    expected: str = ""


class Offline(Section):
    """The form for two CPU cores: small data, small models."""

    base: str
    overrides: tuple[str, ...] = ()  # in place of the file's
    variants: Mapping[str, Change] = Field(default_factory=dict)  # the others stay as they are
    pictures: tuple[str, ...] = ()


class Ablation(Section):
    """A file of configs/ablations."""

    name: str
    question: str
    base: str  # a config's file or name
    overrides: tuple[str, ...] = ()  # for every variant, before its own
    seeds: tuple[NonNegative, ...] = (0, 1, 2)
    variants: dict[str, Variant]
    pictures: tuple[
        str, ...
    ] = ()  # sets with the images of data.test, where that holds features; for the report
    offline: Offline

    @model_validator(mode="after")
    def _names_are_known(self) -> Ablation:
        if not self.variants or not self.seeds:
            raise ValueError("expected at least one variant and one seed")
        if unknown := sorted(self.offline.variants.keys() - self.variants.keys()):
            raise ValueError(f"offline.variants.{unknown[0]}: there is no variant of this name")
        for where, variants in (
            ("", self.variants),
            ("offline.", self.in_form(offline=True).variants),
        ):
            earlier: set[str] = set()
            for name, variant in variants.items():
                for key in ("below", "above", "like", "after"):
                    other = getattr(variant, key)
                    known = earlier if key == "after" else variants.keys() - {name}
                    if other is not None and other not in known:
                        which = "an earlier variant" if key == "after" else "another variant"
                        raise ValueError(
                            f"{where}variants.{name}.{key} is {other!r}, expected {which} of the file"
                        )
                earlier.add(name)
        return self

    def in_form(self, offline: bool) -> Ablation:
        """With base, overrides and pictures of the offline form in place of its own."""
        if not offline:
            return self
        changes = {
            name: change.model_dump(exclude_unset=True)
            for name, change in self.offline.variants.items()
        }
        variants = {
            name: v.model_copy(update=changes.get(name, {})) for name, v in self.variants.items()
        }
        own = {key: getattr(self.offline, key) for key in ("base", "overrides", "pictures")}
        return self.model_copy(update={**own, "name": f"{self.name}_offline", "variants": variants})


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


def load(file: str | Path) -> Ablation:
    """A file, or the name of a shipped one. Raises ConfigError."""
    found = find(file, "configs/ablations")
    return validated(Ablation, read_yaml(found), found)


def children_of(
    ablation: Ablation, out: Path, overrides: Sequence[str], seeds: Sequence[int]
) -> list[Child]:
    """All variants with the first seed, then with the next: what is there early compares all of
    them.
    """
    made = []
    for seed in seeds:
        for name, variant in ablation.variants.items():
            own = (
                f"name={ablation.name}-{name}-{seed}",
                f"seed={seed}",
                f"out={out / name / f'seed-{seed}'}",
            )
            made.append(
                Child(
                    variant=name,
                    seed=seed,
                    out=out / name / f"seed-{seed}",
                    base=variant.base or ablation.base,
                    overrides=(*ablation.overrides, *variant.overrides, *overrides, *own),
                    after=out / variant.after / f"seed-{seed}" if variant.after else None,
                )
            )
    return made
