"""Where the bundle (configs, weights, docs) lies, and what lies where in it."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from fire.parser import DefaultParseValue


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


def require_known_options(command_line: Sequence[str] | None = None) -> None:
    """Refuse an option of ``python -m monai.bundle run`` that no config has.

    MONAI takes every option as an item of the config, so that one that is misspelt changes nothing and is found out
    after hours, if at all. Known are what the configs have at their top, MONAI's own options, and what another option
    refers to (``@name``); of ``a#b`` only ``a`` is looked at. Configs begin with this in ``initialize``.

    Args:
        command_line: program and arguments; those of this process by default. Another program's are left alone.

    Raises:
        ValueError: there is such an option.
    """
    program, *arguments = sys.argv if command_line is None else command_line
    if Path(program).parts[-3:] != ("monai", "bundle", "__main__.py") or arguments[:1] != ["run"]:
        return
    # Here that program has imported them; elsewhere who asks where the bundle lies would wait ten seconds for them.
    from monai.bundle import ConfigParser, run
    from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS

    options = _options(arguments[1:])
    if "args_file" in options:
        options = {**ConfigParser.load_config_file(options["args_file"]), **options}
    files = options.get("config_file", [])
    files = DefaultParseValue(files) if isinstance(files, str) else files  # a list is typed as one text
    also = {*inspect.signature(run).parameters, "help"}
    if "tracking" in options:
        also |= DEFAULT_MLFLOW_SETTINGS["configs"].keys()
    also |= set(re.findall(r"[@%](\w+)", " ".join(map(str, options.values()))))
    require_options(options, files, also, prefix="--")


def require_options(
    options: Iterable[str], files: str | Sequence[str], also: Iterable[str] = (), prefix: str = ""
) -> None:
    """Refuse an option that no config has; of ``a#b`` only ``a`` is looked at.

    Args:
        options: their names.
        files: the configs.
        also: names that are known all the same.
        prefix: of the options where they were given, for the message.

    Raises:
        ValueError: there is such an option; the message names it, and what may have been meant.
    """
    from monai.bundle import ConfigParser

    known = {*ConfigParser.load_config_files(files), *also}
    for option in options:
        name = re.split("#|::", option.lstrip("+~"))[0]
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {prefix}{close[0]}?" if close else ""
            raise ValueError(f"{prefix}{option}: there is no such option in {files}{meant}")


def _options(arguments: Sequence[str]) -> dict[str, str]:
    """Names and values of the options on a command line, as Fire reads them."""
    options = {}
    for argument, following in zip(arguments, [*arguments[1:], "--"]):
        if re.match("--?[A-Za-z_+~]", argument):
            name, equals, value = argument.lstrip("-").partition("=")
            options[name.replace("-", "_")] = value if equals else following
    return options


def _bundles_of_command_line(arguments: list[str]) -> list[Path]:
    named = _options(arguments).get("config_file")
    if named is None:
        return []
    first = named.strip("[]() ").split(",")[0].strip("'\" ")
    return [Path(first).resolve().parent.parent]
