"""What the app folder adds to MONAI Label's sample app; imported by its server only, where MONAI Label is installed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import HTTPException
from monailabel.interfaces.exception import MONAILabelException
from monailabel.interfaces.tasks.infer_v2 import InferType
from monailabel.tasks.train.bundle import BundleTrainTask

from glmamba_monai.errors import root_cause
from glmamba_monai.label_app import MODEL, training_overrides, use_trained_weights

logger = logging.getLogger(__name__)

UNFIT, FAILED = 400, 500  # HTTP status of a request that can be mended, and of anything else


@contextlib.contextmanager
def told_to_the_client() -> Iterator[None]:
    """Answer a request that fails with the reason. MONAI Label answers "Internal Server Error" and logs the reason."""
    try:
        yield
    except HTTPException:
        raise
    except Exception as error:
        cause = root_cause(error)
        unfit = isinstance(cause, (ValueError, OSError, MONAILabelException))
        reason = getattr(cause, "msg", None) or str(cause)
        logger.exception("request failed")
        raise HTTPException(
            UNFIT if unfit else FAILED, reason if unfit else f"{type(cause).__name__}: {reason}"
        ) from error


class GLMambaTraining(BundleTrainTask):
    """Training of the bundle on the images with a final label; see :func:`training_overrides`."""

    def __call__(self, request: dict[str, Any], datastore: Any) -> dict[str, Any]:
        self.request = request
        result = super().__call__(request, datastore)
        logger.info("%s", use_trained_weights(self.bundle_path, self.overrides))
        return result

    def _partition_datalist(self, datalist: list[dict[str, str]], *_: Any, **__: Any) -> tuple[list, None]:
        self.items = datalist
        return datalist, None  # split by patient later

    def _load_checkpoint(self, *_: Any, **__: Any) -> None:
        """Nothing: MONAI Label's loader expects the network under a name that is a text here."""

    def _update_overrides(self, overrides: dict[str, Any]) -> dict[str, Any]:
        self.overrides = training_overrides(self.bundle_path, self.items, self.request, overrides)
        overrides.clear()
        overrides.update(self.overrides)
        return overrides


class GLMambaApp:
    """Goes before MONAI Label's sample app for bundles."""

    def init_infers(self) -> dict[str, Any]:
        infers = super().init_infers()
        task = infers.get(MODEL)
        if task is None or not task.is_valid():
            raise FileNotFoundError(
                f"{self.model_dir}/{MODEL}/models: there is no model.pt; make the app anew, by label-app --weights FILE"
            )
        task.type = InferType.OTHERS  # clients make segments of what a segmentation returns
        task.labels = []
        task.load_strict = True  # otherwise what the file lacks would stay random
        return infers

    def init_trainers(self) -> dict[str, Any]:
        trainers = super().init_trainers()
        if MODEL in trainers:
            trainers[MODEL] = GLMambaTraining(self.models[MODEL], self.conf)
        return trainers

    def infer(self, request: Mapping[str, Any], datastore: Any = None) -> dict[str, Any]:
        with told_to_the_client():
            task = self._infers.get(request.get("model"))
            if task is not None and task.get_path() is None:  # MONAI Label would go on with random weights
                raise FileNotFoundError(f"{task.get_path(validate=False)}: the weights are gone; put them back")
            return super().infer(request, datastore)

    def train(self, request: Mapping[str, Any]) -> dict[str, Any]:
        with told_to_the_client():
            return super().train(request)
