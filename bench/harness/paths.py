"""Where things lie in a clone."""
from pathlib import Path

BENCH = Path(__file__).parent.parent
TRAIN = str(BENCH / 'train.py')
RECIPES = BENCH / 'recipes'
RESULTS = BENCH / 'results'
CARDS = BENCH.parent / 'hub_cards'
