"""What several test modules need."""
import importlib
import sys

import pytest

from config import run


@pytest.fixture
def refused(monkeypatch, capfd):
    """What a script says of a mistake: one line and exit status 2. In this process: each start takes seconds."""
    def refused(script, *args):
        monkeypatch.setattr(sys, 'argv', [script, *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            run(importlib.import_module(script.removesuffix('.py')).main)
        assert stop.value.code == 2
        said = capfd.readouterr()
        assert said.out == ''
        assert said.err.startswith(f'{script}: error: ')
        assert len(said.err.strip().splitlines()) == 1, said.err
        return said.err
    return refused
