"""Slices a second of the real training, against its bare step in a loop.

python benchmarks/training_throughput.py --device cuda --dataset_dir DATA --crop_size 64 --batch 8
python benchmarks/training_throughput.py --device cuda --dataset_dir DATA --crop_size 64 --batch 8 \
    --overlays train_general
python benchmarks/training_throughput.py --network srcnn --crop_size 48 --iterations 20
"""

from __future__ import annotations

import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import fire
import torch
from monai.bundle import ConfigParser
from timing import names

from glmamba_monai.engines import prepare_batch

CONFIGS = Path(__file__).resolve().parent.parent / "bundle" / "configs"


def training_speed(configs: list[str], settings: dict[str, Any]) -> float:
    """Images a second of ``python -m monai.bundle run training``, median of all epochs but the first."""
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", str(configs), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    speeds = re.findall(r"^epoch \d+/.* ([\d.]+) images/s", done.stdout, re.MULTILINE)
    if done.returncode or len(speeds) < 2:
        raise RuntimeError(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-3000:]}")
    return statistics.median(map(float, speeds[1:]))


def bare_speed(configs: list[str], settings: dict[str, Any], epochs: int, iterations: int) -> tuple[float, torch.Size]:
    """Images a second of forward, loss, backward and optimiser step, all from the same config; and the batch's shape.

    One batch of the data, on the device from the start; median of ``epochs`` times ``iterations`` steps.
    """
    parser = ConfigParser()
    parser.read_config(configs)
    parser.update(settings)
    get = parser.get_parsed_content
    device, network, loss_function, optimizer = get("device"), get("net").train(), get("loss"), get("optimizer")
    inferer = get("train#inferer")
    autocast = torch.autocast(device.type, enabled=get("autocast"), **get("autocast_options"))
    image, label = prepare_batch(next(iter(get("train#dataloader"))), device)

    def run(steps: int) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            with autocast:
                loss = loss_function(inferer(image, network), label)
            loss.backward()
            optimizer.step()
        loss.item()  # waits for the GPU
        return time.perf_counter() - begin

    run(iterations)
    return iterations * len(image) / statistics.median(run(iterations) for _ in range(epochs)), image.shape


def main(
    network: str = "glmamba",
    batch: int = 4,
    epochs: int = 4,
    iterations: int = 50,
    amp: bool = True,
    device: str = "cpu",
    dataset_dir: str | None = None,
    crop_size: int | None = None,
    overlays: str | tuple[str, ...] = (),
) -> None:
    """Print a Markdown table.

    Args:
        network: registered name.
        batch: slices of a step.
        epochs: of the training; the first does not count, so at least 2.
        iterations: steps of an epoch.
        amp: bfloat16 autocast, on cuda.
        device: cpu or cuda.
        dataset_dir: folder of subjects; the demo phantom if there is none.
        crop_size: side of the square crops in pixels; None for whole slices.
        overlays: configs of the bundle to lay over train.json, separated by commas, such as "train_general".
    """
    configs = [str(CONFIGS / f"{name}.json") for name in ("train", *(names(overlays) if overlays else ()))]
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "network": network,
            "batch_size": batch,
            "epochs": epochs,
            "iterations_per_epoch": iterations,
            "crop_size": f"${crop_size}",  # "--crop_size None" would leave the config's default
            "amp": amp,
            "device": f"$torch.device('{device}')",
            "val_interval": epochs,
            "val_slices": 1,
            "output_dir": f"{folder}/results",
            "cache_dir": f"{folder}/volumes",
            **({} if dataset_dir is None else {"dataset_dir": str(dataset_dir)}),
        }
        training = training_speed(configs, settings)
        bare, shape = bare_speed(configs, settings, epochs - 1, iterations)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    precision = "bfloat16 autocast" if amp and device == "cuda" else "float32"
    print(f"{date.today()}, {machine}, torch {torch.__version__}, {network}, batch {tuple(shape)}, {precision}")
    print(f"{', '.join(Path(config).stem for config in configs)}\n")
    print("| | images/s | ms a batch |\n| --- | ---: | ---: |")
    for name, speed in (("the bare step in a loop", bare), ("`python -m monai.bundle run training`", training)):
        print(f"| {name} | {speed:.1f} | {1000 * batch / speed:.1f} |")
    print(f"| training over bare step | {training / bare:.2f} | |", flush=True)


if __name__ == "__main__":
    fire.Fire(main)
