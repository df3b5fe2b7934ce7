"""Where the bundle (configs, weights, docs) lies, and what lies where in it."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def locate_bundle(look_at_command_line: bool = True) -> str:
    """The folder of the bundle in use; the default of ``bundle_root`` in every config.

    ``monai.bundle`` does not tell a config where it lies, so this looks, in this order, at ``--config_file`` on the
    command line (the bundle is the parent of its ``configs`` folder), and beside this package, where it lies in a
    checkout of the repository.

    Args:
        look_at_command_line: false where the command line belongs to another program.

    Raises:
        FileNotFoundError: there is no bundle there.
    """
    beside_package = Path(__file__).resolve().parent.parent / "bundle"
    named = _bundles_of_command_line(sys.argv) if look_at_command_line else []
    for folder in [*named, beside_package]:
        if (folder / "configs" / "metadata.json").is_file():
            return str(folder)
    raise FileNotFoundError(
        f"the bundle is not beside the package ({beside_package}); name its folder with --bundle_root"
    )


def weights_folders(bundle_root: str | os.PathLike[str], network: str) -> list[str]:
    """Where to look for weights of a network in the bundle, in this order: ``models/NETWORK``, if any, then ``models``.

    ``models`` itself holds those of ``glmamba``, where MONAI's tools expect a bundle's weights; they are refused when
    they are loaded into another network.

    Args:
        bundle_root: folder of the bundle.
        network: registered name.
    """
    models = Path(bundle_root) / "models"
    own = models / network
    return [*([str(own)] if own.is_dir() else []), str(models)]


def _bundles_of_command_line(arguments: list[str]) -> list[Path]:
    for i, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name.lstrip("-").replace("-", "_") == "config_file":
            value = value or (arguments[i + 1] if i + 1 < len(arguments) else "")
            first = value.strip("[]() ").split(",")[0].strip("'\" ")
            return [Path(first).resolve().parent.parent]
    return []
