"""How strongly the policy is held near the starting model.

charjax sweep --config=configs/sweeps/kl.py --workdir=runs/kl
"""


def get_sweep(config):
  for factor in (0.0, 0.25, 1.0, 4.0):
    kl = config.policy.kl * factor
    yield f'kl={kl:g}', {'policy.kl': kl, 'policy.kl_target': config.policy.kl_target if kl else 0.0}
