"""What the app folder adds to MONAI Label's sample app; imported by its server only, where MONAI Label is installed."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi import HTTPException
from monailabel.interfaces.exception import MONAILabelException
from monailabel.interfaces.tasks.infer_v2 import InferType
from monailabel.tasks.infer.bundle import BundleInferTask
from monailabel.tasks.train.bundle import BundleTrainTask
from torch import nn

from glmamba_monai.engines import load_weights
from glmamba_monai.errors import root_cause
from glmamba_monai.label_app import (
    BY_FACTOR,
    MODEL,
    NETWORK,
    choose_weights,
    training_overrides,
    use_trained_weights,
)
from glmamba_monai.transforms.volume import FACTOR_KEY

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


class GLMambaInference(BundleInferTask):
    """Inference of the bundle with the weights for the factor of each volume; see :func:`choose_weights`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.loaded: dict[tuple[str, Path], tuple[Any, nn.Module]] = {}
        super().__init__(*args, type=InferType.OTHERS, **kwargs)  # clients make segments of what a segmentation returns
        self.labels = []
        self._config["model_filename"].insert(0, BY_FACTOR)

    def clear_cache(self) -> None:
        self.loaded.clear()

    def _update_device(self, data: Mapping[str, Any] | None) -> None:
        """MONAI Label's puts the text of the request into the config, where one after a $ would be run as Python."""
        if data and data.get("device"):
            try:
                torch.device(data["device"])
            except RuntimeError:
                raise ValueError(f"device {data['device']!r}: expected one that the server lists, or cpu") from None
        super()._update_device(data)

    def _get_network(self, device: str, data: Mapping[str, Any] | None) -> nn.Module:
        """MONAI Label's holds one file, and takes another for it that was written at the same time."""
        data = data or {}  # None where the server loads a network before the first request
        factor = data.get(FACTOR_KEY)
        factor = None if factor is None else np.asarray(factor).tolist()
        path = choose_weights(self.bundle_path, data.get("model_filename"), factor)
        written = (path.stat().st_mtime_ns, path.stat().st_size)
        loaded, network = self.loaded.get((device, path), (None, None))
        if loaded != written:
            network = copy.deepcopy(self.network).to(device).eval()
            load_weights(network, path, NETWORK)
            self.loaded[device, path] = written, network
        logger.info("weights of %s", path)
        return network


class GLMambaTraining(BundleTrainTask):
    """Training of the bundle on the images with a final label; see :func:`training_overrides`."""

    def config(self) -> dict[str, Any]:
        options = super().config()
        options["model_filename"].insert(0, BY_FACTOR)
        return options

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
        infers[MODEL] = GLMambaInference(self.models[MODEL], self.conf)
        return infers

    def init_trainers(self) -> dict[str, Any]:
        trainers = super().init_trainers()
        if MODEL in trainers:
            trainers[MODEL] = GLMambaTraining(self.models[MODEL], self.conf)
        return trainers

    def infer(self, request: Mapping[str, Any], datastore: Any = None) -> dict[str, Any]:
        with told_to_the_client():
            return super().infer(request, datastore)

    def train(self, request: Mapping[str, Any]) -> dict[str, Any]:
        with told_to_the_client():
            return super().train(request)
