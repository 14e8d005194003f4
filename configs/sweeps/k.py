"""K, how many replies in character are drawn and ranked to each message, beside those that the config draws without.

charjax sweep --config=configs/sweeps/k.py --workdir=runs/k
"""


def get_sweep(config):
  for k in (1, 2, 4, 6):
    ranked = k + config.replies.plain + config.replies.opposed
    most = {
      'policy.ranked_replies': min(config.policy.ranked_replies, ranked),
      'policy.shown_replies': min(config.policy.shown_replies, k),
    }
    yield f'k={k}', {'replies.shown': k} | most
