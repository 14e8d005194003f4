"""How fast the policy learns, around the config's own learning rate.

charjax sweep --config=configs/sweeps/learning_rate.py --workdir=runs/learning_rate
"""


def get_sweep(config):
  for factor in (0.25, 0.5, 1.0, 2.0):
    rate = config.policy.learning_rate * factor
    yield f'lr={rate:g}', {'policy.learning_rate': rate}
