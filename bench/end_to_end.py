"""Whole epochs on the CPU, timed from outside: train.py, two runs of it at once, one on two processes, and timm's own.

An epoch's time is that between two rows of summary.csv, which both scripts write when an epoch is done: training,
validation on the same test images, and saving. The first epoch, with start-up and warm-up, doesn't count.
"""
import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from tqdm import tqdm

from config import UserError, cores
from data import load_split
from engine import default_amp
from run_folder import RunFolder

TRAIN = str(Path(__file__).parent / 'train.py')


def write_subset(folder: Path, args: argparse.Namespace) -> None:
    """Parquet files of the first --images training images and a fifth as many test images, columns img and label."""
    for split, images in (('train', args.images), ('test', args.images // 5)):
        if args.data_dir:
            data = load_split(args.data_dir, split, None)
            if len(data) < images:
                raise UserError(f'--data-dir {args.data_dir} has {len(data)} images in {split}, '
                                f'--images {args.images} wants {images}')
            data = data.select(range(images))
        else:
            generator = np.random.default_rng(0)
            smooth = generator.integers(0, 256, (images, 8, 8, 3), dtype=np.uint8)
            features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(num_classes=10))
            data = datasets.Dataset.from_dict(
                dict(img=[Image.fromarray(picture).resize((32, 32), Image.Resampling.BILINEAR) for picture in smooth],
                     label=generator.integers(0, 10, images)), features=features)
        data.to_parquet(str(folder / f'{split}-00000-of-00001.parquet'))


def commands(model: str, data: Path, output: Path, args: argparse.Namespace) -> dict[str, list[list[str]]]:
    """The contestants by name, each one or several command lines that run at the same time."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    shared = ['--model', model, '--drop-path', str(args.drop_path[0]), '--epochs', str(args.epochs), '--opt', 'sgd',
              '--lr', '0.1', '--channels-last', '--output', str(output)]
    ours = [*shared, '-c', 'cifar10', '--data-dir', str(data), '--val-split', 'test', '--experiment']
    amp = default_amp('cpu') if args.amp is None else args.amp
    ours[:0] = ['--amp' if amp else '--no-amp']
    size = args.batch_size
    launch = ['accelerate', 'launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1',
              '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', str(port)]
    half = ['--threads', str(max(1, cores() // 2)), '-b', str(size)]
    found = {
        'train.py': [[sys.executable, TRAIN, *ours, 'one', '-b', str(size)]],
        'train.py, 2 runs at once': [[sys.executable, TRAIN, *ours, name, *half] for name in ('left', 'right')],
        'train.py, 2 processes': [[*launch, TRAIN, *ours, 'two', '-b', str(size // 2), '--require-processes', '2']],
    }
    if args.timm_train:
        found["timm's train.py"] = [[
            sys.executable, '-m', 'timm_sd', args.timm_train, *shared, '--model-kwargs', 'drop_path_mode=sample',
            '--dataset', f'hfds/{data}', '--input-key', 'img', '--target-key', 'label', '--num-classes', '10',
            '--val-split', 'test', '--train-crop-mode', 'rkrc', '--color-jitter', '0', '--device', 'cpu',
            *(['--amp', '--amp-dtype', 'bfloat16'] if amp else []), '-b', str(size), '-j', str(cores()),
            '--no-prefetcher', '--sched', 'step', '--warmup-epochs', '0', '--log-interval', '1000',
            '--experiment', 'timm']]
    return found


def epoch_seconds(together: list[list[str]], epochs: int) -> list[float]:
    """Runs trainings at the same time; seconds of each epoch but the first, divided by how many they are."""
    ends: list[list[float]] = [[] for _ in together]
    folders = [RunFolder(Path(*(command[command.index(flag) + 1] for flag in ('--output', '--experiment'))))
               for command in together]
    with tempfile.TemporaryFile('w+') as log:
        processes = [subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT,
            env=dict(os.environ, ACCELERATE_USE_CPU='true'))
            for command in together]
        try:
            while min(map(len, ends)) < epochs and not any(process.poll() for process in processes):
                time.sleep(0.02)
                for folder, own in zip(folders, ends, strict=True):
                    own += [time.perf_counter()] * (folder.epochs_written() - len(own))
        finally:
            for process in processes:
                process.terminate()
                process.wait()
        if min(map(len, ends)) < epochs:
            log.seek(0)
            raise UserError(f'{" ".join(together[0][:4])} ... failed: {log.read()[-1500:]}')
    return [statistics.mean(after - before for before, after in pairs) / len(together)
            for pairs in zip(*(list(zip(own, own[1:], strict=False)) for own in ends), strict=True)]


def time_epochs(model: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each epoch but the first of every contestant, which run in turns."""
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, 'data')
        data.mkdir()
        write_subset(data, args)
        for repeat in range(args.repeats):
            turn = commands(model, data, Path(scratch, f'turn-{repeat}'), args)
            for name, together in tqdm(turn.items(), desc=f'{model}, turn {repeat + 1} of {args.repeats}'):
                seconds.setdefault(name, []).extend(epoch_seconds(together, args.epochs))
    return seconds
