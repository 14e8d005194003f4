"""How strongly the policy is held near the starting model.

charjax sweep --config=configs/sweeps/kl.py --workdir=runs/kl
"""


def get_sweep(config):
  for factor in (0.0, 0.25, 1.0, 4.0):
    kl = config.policy.kl * factor
    # Of no penalty there is nothing to adapt.
    yield f'kl={kl:g}', {'policy.kl': kl} | ({} if kl else {'policy.kl_target': 0.0})
