"""A run's export as a model of MLflow: logged without pickle, loaded by the module below.

RUN/export -> the run's logged model and a version in the registry -> pyfunc: rows of a picture's
bytes and a prompt in, answers out. Who loads it needs this package.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

NEEDS = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "pillow")


def log_export(folder: Path, name: str, uri: str, run_id: str) -> None:
    """Logs an export with a run, and registers it. Raises whatever the store does."""
    import mlflow
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import ColSpec, Schema

    given = Schema([ColSpec("binary", "image"), ColSpec("string", "prompt", required=False)])
    with _store_at(uri):
        client = mlflow.MlflowClient(uri)
        place = client.get_run(run_id).info.experiment_id  # else mlflow takes its default one
        made = client.create_logged_model(place, "model", source_run_id=run_id)
        Model.log(
            artifact_path=None,
            name="model",
            model_id=made.model_id,
            flavor=mlflow.pyfunc,
            run_id=run_id,
            registered_model_name=re.sub("[/:]", "_", name),
            loader_module=__name__,
            data_path=str(folder),
            signature=ModelSignature(given, Schema([ColSpec("string")])),
            pip_requirements=[f"{each}=={importlib.metadata.version(each)}" for each in NEEDS],
        )


@contextmanager
def _store_at(uri: str) -> Iterator[None]:
    """Has mlflow's own functions work on a store. They keep it, with its password, in
    MLFLOW_TRACKING_URI, which would send the next run of this process there: both are put back.
    """
    import mlflow

    given = os.environ.get("MLFLOW_TRACKING_URI")
    before: Any = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if given is not None:
            os.environ["MLFLOW_TRACKING_URI"] = given


class Answers:
    """What mlflow.pyfunc.load_model wraps."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        import harness.hub  # noqa: F401  registers the classes

        self._model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self._processor: Any = AutoProcessor.from_pretrained(folder)

    def predict(self, rows: pandas.DataFrame) -> list[str]:
        """Returns an answer to each row: `image`, an encoded picture; `prompt`, or none for a
        caption.
        """
        answers = []
        for row in rows.to_dict("records"):
            prompt = row.get("prompt")  # pandas calls a missing one nan
            asked = prompt if isinstance(prompt, str) and prompt else None
            answers.append(self._answer(row["image"], asked))
        return answers

    def _answer(self, image: bytes, prompt: str | None) -> str:
        inputs = self._processor(images=[image], text=prompt and [prompt])
        ids = self._model.generate(**inputs.to(self._model.device))
        return str(self._processor.post_process_image_text_to_text(ids)[0])


def _load_pyfunc(path: str) -> Answers:
    """MLflow's name for what loads a model."""
    return Answers(path)
