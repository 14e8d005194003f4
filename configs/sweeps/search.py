"""Settings of the policy, searched by Optuna: as large a margin as neutral answers allow.

  pip install -e '.[search]'
  charjax sweep --config=configs/sweeps/search.py --workdir=runs/search --trials=20

Every process that is given this command works on the same study, so that many may share it. What it finds was chosen by
the kept pairs, which no longer measure it: take another seed, other pairs, or people, to say how good it is.
"""

from charjax.errors import UserError


def get_search(config, trial):
  rate = config.policy.learning_rate
  return {
    'policy.learning_rate': trial.suggest_float('learning_rate', rate / 4, rate * 4, log=True),
    'policy.kl': trial.suggest_float('kl', 0.005, 0.5, log=True),
  }


def get_value(summary):
  margins = [metrics['margin']['delta']['mean'] for metrics in summary['traits'].values() if metrics['margin']['delta']]
  if not margins:
    raise UserError('the search goes by the margin on kept pairs: give the traits some, or score by what you have')
  lost = max(0.0, summary['neutral']['log_prob_lost'] or 0.0)
  # Losing 2% of the log-prob of neutral answers is as bad as a margin is good that is easily seen.
  return sum(margins) / len(margins) - lost / 0.02 * 0.05
