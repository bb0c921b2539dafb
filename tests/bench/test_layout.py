"""Imports point down: scripts to paper and timing, these to harness, that to timm_sd."""
import ast

import pytest

from support.commands import BENCH

MAY_IMPORT = dict(harness={'harness'}, paper={'harness', 'paper'}, timing={'harness', 'timing'})
OURS = {'harness', 'paper', 'timing', *(path.stem for path in BENCH.glob('*.py'))}


def imported(path):
    """The first part of the name of each module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
            [node.module] if isinstance(node, ast.ImportFrom) else []
        yield from (name.partition('.')[0] for name in names)


@pytest.mark.parametrize('package', MAY_IMPORT)
def test_imports_point_down(package):
    files = list((BENCH / package).rglob('*.py'))
    assert len(files) > 3
    for path in files:
        assert set(imported(path)) & OURS <= MAY_IMPORT[package], path
