"""Each ranker for itself; one that cannot tell the character is measured, too, and does not stop its run.

charjax sweep --config=configs/sweeps/ranker.py --workdir=runs/ranker
"""


def get_sweep(config):
  del config
  for ranker in ('likelihood', 'pairwise', 'pointwise'):
    yield ranker, {'rankings.ranker': ranker, 'rankings.minimum_accuracy': 0.0}
