"""What is made public of a run: its card with what it is made from, and a whole Hub repository."""
import hashlib
import json
from pathlib import Path
from typing import Any

import timm
from timm.models._hub import save_config_for_hf

import timm_sd
from harness.card import (
    Comparison,
    architecture,
    channels_of,
    classes_and_size,
    full_name,
    make_card,
    method_kwargs,
    method_of,
    plain_kwargs,
)
from harness.errors import UserError
from harness.files import read_mapping, write_atomic, write_json
from harness.network import registered_name
from harness.plots import save_curves, save_depths, save_gates
from harness.results import without_paths
from harness.run_folder import RunFolder


def read_run(run_folder: Path) -> dict[str, Any]:
    """The results of a finished run that may be made public.

    Raises:
        UserError: If it isn't finished and whole, holds files of two runs, doesn't say what its data was, or was not
            trained with whole blocks dropped.
    """
    run = RunFolder(run_folder)
    read = run.read_run()
    if read is None:
        raise UserError(f'{run_folder} is no finished run: it has no results.json')
    results, _ = read
    if not (run_folder / 'model.safetensors').is_file():
        raise UserError(f'{run_folder} is no whole run: it has no model.safetensors')
    if 'data' not in results:
        raise UserError(f'{run_folder} does not say what its data was: an older version wrote it, which guessed; '
                        'train it again')
    results['weights_sha256'] = run.check_one_run(results)
    results['model'] = registered_name(results['model'])  # it may be hf-hub:ORG/NAME
    if results['blocks'] is None or method_of(results)[0] != 'batch':
        raise UserError(f'{run_folder} was not trained with whole blocks dropped; a card would say so')
    public = without_paths(results)
    if public['changed_from_recipe'] != results['changed_from_recipe']:
        raise UserError(f'{run_folder} has a path of this machine in its weights: an older version wrote it; train it '
                        'again')
    return public


def copy_weights(run_folder: Path, results: dict[str, Any], target: Path) -> None:
    """Copies model.safetensors.

    Args:
        run_folder: Of the run.
        results: What `read_run` gave of it.
        target: The copy.

    Raises:
        UserError: If it is no longer what `read_run` saw.
    """
    content = (run_folder / 'model.safetensors').read_bytes()
    if hashlib.sha256(content).hexdigest() != results['weights_sha256']:
        raise UserError(f'{run_folder} was written anew meanwhile; run this again')
    write_atomic(target, content)


def read_depth(folder: Path, results: dict[str, Any]) -> dict[str, Any] | None:
    """What validate.py measured of a run's weights with fewer blocks, in depth.json of its folder; None without one.

    Raises:
        UserError: If it can't be read, or is of other weights.
    """
    path = folder / 'depth.json'
    if not path.exists():
        return None
    depth = read_mapping(path, json.loads, 'validate.py --results-file writes it')
    digest = results.get('weights_sha256')
    if digest is None or digest not in depth.get('weights_sha256', {}).values():
        raise UserError(f'{path} is of other weights than results.json; measure it anew, or remove it')
    return depth


def write_card_folder(run_folder: Path, results: dict[str, Any], comparison: Comparison, folder: Path,
                      repo: str | None = None) -> None:
    """Writes the card and what it is made from: results.json, summary.csv, curves.png and gates.png.

    Where the run folder has a depth.json, which validate.py writes, that and depth.png too.

    Args:
        run_folder: Of the run.
        results: What `read_run` gave of it.
        comparison: What the card holds it against.
        folder: Where to.
        repo: The Hub repository that the card's snippets load from; without it they load from the package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / 'results.json', results)
    write_atomic(folder / 'summary.csv', (run_folder / 'summary.csv').read_bytes())
    _, rows = RunFolder(folder).read_run() or ({}, [])  # of this run, as the copy stands there
    save_curves(rows, results, folder / 'curves.png')
    _, schedule, _ = method_of(results)
    save_gates(timm_sd.drop_path_rates(results['blocks'], results['drop_path_rate'], schedule), folder / 'gates.png',
               [row['drop_path_rate'] for row in rows if 'drop_path_rate' in row])
    depth = read_depth(run_folder, results)
    if depth is not None:
        write_json(folder / 'depth.json', depth)
        save_depths(depth['rows'], folder / 'depth.png')
    write_atomic(folder / 'README.md', make_card(results, comparison, repo, depth).encode())


def method_config(results: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of the method, for a training that goes on with it.

    Our networks take it as arguments, which timm and transformers find in `model_args`. For timm's own networks
    `drop_path_rate` would be that of timm's DropPath, so they get a key that both ignore.
    """
    if not architecture(full_name(results)).startswith('sd_'):
        return dict(stochastic_depth=method_kwargs(results))
    mode, schedule, scale = method_of(results)
    args = dict(drop_path_rate=results['drop_path_rate'], drop_path_schedule=schedule, drop_path_mode=mode)
    if scale != 'eval':  # which mode 'batch' has by default; said here, no other mode could be asked for
        args['drop_path_scale'] = scale
    return dict(model_args=args)


def write_repository(run_folder: Path, results: dict[str, Any], comparison: Comparison, folder: Path,
                     repo: str) -> None:
    """Writes everything that a Hub repository holds; see `write_card_folder`."""
    write_card_folder(run_folder, results, comparison, folder, repo)
    name = full_name(results)
    classes, size = classes_and_size(results)
    model: Any = timm.create_model(architecture(name), num_classes=classes, **plain_kwargs(results))
    labels = dict(label_names=results['label_names']) if 'label_names' in results else {}
    given = {key: results['args'][key] for key in ('mean', 'std') if results['args'][key]}
    if results['args']['in_memory']:  # images in memory are not cropped
        given.update(crop_pct=1.0, interpolation='bilinear')
    path = folder / 'config.json'
    save_config_for_hf(model, str(path), model_config=dict(
        labels, **method_config(results), pretrained_cfg=dict(
            given, tag=name.partition('.')[2], license='apache-2.0', input_size=(channels_of(results), size, size),
            paper_name='Deep Networks with Stochastic Depth', paper_ids='arXiv:1603.09382', origin_url=None,
            test_input_size=None, test_crop_pct=None)))
    config = json.loads(path.read_text())
    del config['model_args']['num_classes']  # timm takes that of the top level, and transformers adds it to these
    write_json(path, config)
    copy_weights(run_folder, results, folder / 'model.safetensors')
