"""What training each trait does to the others: all together, each alone, and all but one; measured on all of them.

charjax sweep --config=configs/sweeps/crosstalk.py --workdir=runs/crosstalk

Messages, replies, rankings and preference models are those of all traits and are made once. Each policy takes as many
steps, and in each step a trait has as many prompts as in the config's own policy, or a few more where they do not
divide: what changes is its company.
"""

import math

from charjax import character, limits
from charjax.errors import UserError


def get_sweep(config):
  chosen = character.select(character.load(config.character.path), config.character.traits)
  traits = [trait.id for trait in chosen.traits if trait.weight]
  if len(traits) < 2:
    raise UserError('config.character.traits: crosstalk takes two traits or more')
  if not config.policy.lora_rank or (config.preference.epochs and not config.preference.lora_rank):
    raise UserError(
      'crosstalk trains adapters: set config.policy.lora_rank, and config.preference.lora_rank where its epochs are '
      'above 0, with learning rates for them'
    )

  def trial(*some):
    policy = config.policy
    count = math.ceil(policy.prompts_per_step * len(some) / len(traits))
    prompts, parts = limits.in_parts(count, policy.prompts_per_step // policy.microbatches)
    return {
      'policy.traits': some,
      'policy.prompts_per_step': prompts,
      'policy.microbatches': parts,
      # None is left out because the preference model does not tell it from chance.
      'policy.keep_unproven_traits': True,
    }

  yield 'all', trial(*traits)
  for trait in traits:
    yield f'only-{trait}', trial(trait)
  if len(traits) > 2:
    for trait in traits:
      yield f'without-{trait}', trial(*(other for other in traits if other != trait))
