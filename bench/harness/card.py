"""The model card of a run, made from its results.json; nothing in it is typed by hand."""
import re
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

import timm_sd  # noqa: F401  (registers the models)
from harness.network import size_kwargs
from harness.paths import CARDS
from timm_sd.rates import RateOverTime

# The data set of each tag of the registry.
DATASETS = dict(c10='uoft-cs/cifar10', c100='uoft-cs/cifar100', svhn='ufldl-stanford/svhn')


class Comparison(NamedTuple):
    """What a card holds the run against.

    Attributes:
        paper: The paper's errors of this network (`paper.numbers.NetworkErrors`); None where it has none.
        public: The best public weights of this depth (`paper.numbers.Public`); None where none are known.
        recipe_of: Whose the run's recipe is.
        epochs: The recipe's; the run's where the package doesn't have the recipe.
        changed: The flags by which the run differs from its recipe, but model, epochs and fingerprint.
        saving: What throughput.py measured of this network at this p_L: a row, and its `hardware`.
    """
    paper: Any
    public: Any
    recipe_of: str
    epochs: int
    changed: dict[str, Any]
    saving: dict[str, Any] | None


def architecture(model: str) -> str:
    """timm's own name of a network where it has one, so that plain timm loads it; else the name without its tag."""
    name = model.partition('.')[0]
    plain = name.removeprefix('sd_')
    return plain if timm.is_model(plain) else name


def full_name(results: dict[str, Any]) -> str:
    """The model's name with its tag: the package's if it stands for the data, else one that says what they are."""
    cfg: Any = timm.get_pretrained_cfg(results['model'])
    if DATASETS.get(cfg.tag) == dataset_of(results):
        return f'{cfg.architecture}.{cfg.tag}'
    words = re.sub(r'[^\w-]', '_', dataset_of(results).rpartition('/')[2].lower())
    return f'{cfg.architecture}.sd_{words}'


def plain_kwargs(results: dict[str, Any]) -> dict[str, Any]:
    """--model-kwargs without the method's, and the image size: what the plain network is made with."""
    kwargs = {key: value for key, value in results['args']['model_kwargs'].items() if not key.startswith('drop_path')}
    return dict(size_kwargs(results['model'], results['args']['img_size']), **kwargs)


def dataset_of(results: dict[str, Any]) -> str:
    """The data set without its revision."""
    return results['dataset'].partition('@')[0]


def method_of(results: dict[str, Any]) -> tuple[str, str, str]:
    """Mode, schedule and scale of a run."""
    if 'drop_path_mode' in results:
        return results['drop_path_mode'], results['drop_path_schedule'], results['drop_path_scale']
    # Older runs, and those of constant depth, have their flags alone; one not given was the default of that time.
    args = results['args']
    return args.get('drop_path_mode') or 'batch', args['drop_path_schedule'] or 'linear', \
        args['drop_path_scale'] or 'train'


def over_time_of(results: dict[str, Any]) -> str:
    """How the rates of a run changed over its epochs, in words; nothing where they didn't."""
    args = results['args']  # those of older runs lack them
    over_time = RateOverTime(args.get('drop_path_when', 'standard'), results['epochs'],
                             args.get('drop_path_change', 'constant'), args.get('drop_path_cutoff'))
    return '' if over_time.is_constant else over_time.describe()


def depth_of(results: dict[str, Any], depth: dict[str, Any]) -> dict[str, Any]:
    """What a card says of its weights with fewer blocks: their rows, the other networks beside them, and the rest."""
    ours = [name for name, digest in depth['weights_sha256'].items() if digest == results['weights_sha256']]
    others = [name for name in depth['weights_sha256'] if name not in ours]
    return dict(depth, rows=[row for row in depth['rows'] if row['network'] in ours], others=list(map(as_text, others)))


def method_kwargs(results: dict[str, Any]) -> dict[str, Any]:
    """The method of a run, as arguments of `timm_sd.add_stochastic_depth`."""
    mode, schedule, scale = method_of(results)
    return dict(drop_path_rate=results['drop_path_rate'], schedule=schedule, mode=mode, scale=scale)


def classes_and_size(results: dict[str, Any]) -> tuple[int, int]:
    """Number of classes, and the side of the images in pixels."""
    cfg: Any = timm.get_pretrained_cfg(results['model'])
    return len(results.get('label_names', ())) or cfg.num_classes, results['args']['img_size'] or cfg.input_size[-1]


def channels_of(results: dict[str, Any]) -> int:
    """3, or 1 of a network for grey images."""
    return results['args']['model_kwargs'].get('in_chans', 3)


def as_text(value: Any) -> str:
    """A value as text of a Markdown document, in one line: what a user named can be no heading, table row or HTML."""
    text = ' '.join(str(value).split())
    # an underscore between two letters or digits is one, as in cifar10_weights
    return re.sub(r'[\\`*\[\]<>|~&!#]|(?<![^\W_])_|_(?![^\W_])', r'\\\g<0>', text)


def as_code(value: str) -> str:
    """A value as it may stand between two backticks."""
    return ' '.join(value.split()).replace('`', "'")


def _texts(value: Any) -> Any:
    """A value of results.json with each text in it escaped."""
    if isinstance(value, dict):
        return {key: _texts(of_key) for key, of_key in value.items()}
    return as_text(value) if isinstance(value, str) else value


def make_card(results: dict[str, Any], comparison: Comparison, repo: str | None = None,
              depth: dict[str, Any] | None = None) -> str:
    """The model card of a run.

    Args:
        results: Its results.json.
        comparison: What it is held against.
        repo: The Hub repository that the card's snippets load from; without it they load from the package.
        depth: What validate.py measured of these weights with fewer blocks, see `read_depth`.
    """
    name, dataset = full_name(results), dataset_of(results)
    hub_dataset = dataset if re.fullmatch(r'[\w-]+/[\w.-]+', dataset) else None
    classes, size = classes_and_size(results)
    features: Any = timm.create_model(architecture(name), features_only=True, **plain_kwargs(results)).eval()
    data = ModelCardData(
        library_name='timm', license='apache-2.0', pipeline_tag='image-classification', model_name=name,
        tags=['image-classification', 'timm', 'stochastic-depth'], datasets=hub_dataset and [hub_dataset],
        metrics=['accuracy'], eval_results=[EvalResult(
            task_type='image-classification', dataset_type=dataset, dataset_name=dataset,
            dataset_split=results.get('test_split', results['args']['test_split']), metric_type='accuracy',
            metric_value=round(100 - results['test_best']['top1_err'], 2), metric_name='Top-1 accuracy (%)')])
    return str(ModelCard.from_template(
        data, template_path=str(CARDS / 'template.md'), name=as_text(name), source=f'hf-hub:{repo}' if repo else name,
        r=_texts(results), recipe=as_code(results['recipe']), dataset=as_text(dataset), hub_dataset=hub_dataset,
        classes=classes, size=size, repo=repo,
        **dict(comparison._asdict(), changed={key: as_text(value) for key, value in comparison.changed.items()}),
        over_time=over_time_of(results), depth=depth and depth_of(results, depth),
        is_timms=not architecture(name).startswith('sd_'), method=method_kwargs(results),
        maps=', '.join(str(tuple(x.shape)) for x in features(torch.zeros(1, channels_of(results), size, size))),
        width=timm.create_model(architecture(name), **plain_kwargs(results)).num_features))
