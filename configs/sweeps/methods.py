"""Ways to train the policy on the same messages, replies, rankings and preference model.

charjax sweep --config=configs/sweeps/methods.py --workdir=runs/methods

GRPO, RLOO and PPO draw replies and are rewarded for them; DPO learns from the ranked replies, best-of-N distillation
from the one of them that the preference model prefers, and context distillation from what the model says when it is
shown the trait. At each step all of them draw, or read, about as many replies; where fewer were drawn with the trait
shown, context distillation reads those of more messages, and is held by more neutral ones.
"""

import math

from charjax import limits


def get_sweep(config):
  policy = config.policy
  wanted = policy.replies_per_prompt + policy.ranked_replies or policy.shown_replies
  each = min(limits.ranked_to_message(config.replies), wanted)

  def learned_from(drawn=0, ranked=0, shown=0):
    return {
      'policy.replies_per_prompt': drawn,
      'policy.ranked_replies': ranked,
      'policy.shown_replies': shown,
      # Adapted by what is drawn.
      'policy.kl_target': policy.kl_target if drawn else 0.0,
    }

  some = max(1, min(each, config.replies.shown))
  count = math.ceil(policy.prompts_per_step * each / some)
  prompts, parts = limits.in_parts(count, math.ceil(count / policy.microbatches))
  drawn, read = learned_from(drawn=each), learned_from(ranked=each)
  shown = learned_from(shown=some) | {
    'policy.prompts_per_step': prompts,
    'policy.microbatches': parts,
  }
  for seed in range(3):
    again = {'policy.seed': seed}
    best = {'policy.ranked_weight': 0.0, 'policy.ranked_likelihood': 1.0, 'policy.ranked_labels': 0.0}
    yield f'grpo-{seed}', {'policy.advantages': 'grpo'} | drawn | again
    yield f'rloo-{seed}', {'policy.advantages': 'rloo'} | drawn | again
    yield f'ppo-{seed}', {'policy.advantages': 'ppo'} | drawn | again
    yield f'dpo-{seed}', {'policy.ranked_likelihood': 0.0} | read | again
    yield f'best-of-n-{seed}', best | read | again
    yield f'distillation-{seed}', shown | again
