"""Prints how often the likelihood ranker is right on a character's written pairs, by number of examples shown.

  python scripts/examples_table.py [CHARACTER ...] [--model=PATH]

CHARACTER is a shipped character or a .toml file, `assistant` by default; PATH is what config.model.path takes. The
table is Markdown, a row a trait: how many of its kept and of its choosing pairs are right with 0, 2 and 4 worked
examples, then the share of all traits' pairs with its 95% interval. As in a run, whether a reply counts by its tokens'
mean or sum is chosen on the choosing pairs. Nine traits of 28 pairs took eight minutes of processor time with
SmolLM2-135M-Instruct.
"""

import sys
from collections.abc import Sequence

from absl import app, flags

from charjax import character as characters
from charjax import defaults
from charjax.model import checkpoint_source, language_model
from charjax.model.language_model import LanguageModel
from charjax.stages.rankers import Settings
from charjax.stages.rankings import length_treatment, weigh, written_margins, written_pairs
from charjax.stages.statistics import share

EXAMPLES = (0, 2, 4)
USES = ('kept', 'choosing')

_MODEL = flags.DEFINE_string('model', defaults.get_config().model.path, 'what config.model.path takes')


def rows(model: LanguageModel, character: characters.Character) -> list[str]:
  """The rows of one character: its traits, then all of them together."""
  weighed = {}
  for examples in EXAMPLES:
    weighed[examples] = []
    for trait in character.traits:
      pairs = written_pairs(trait)
      found = weigh(model, trait, pairs, Settings(examples))
      weighed[examples].append({'uses': [pair.use for pair in pairs], 'examples': found})
      print(f'{character.name}, {trait.id}, {examples} examples: done', file=sys.stderr)
  lengths = {examples: length_treatment(some)[0] for examples, some in weighed.items()}

  def right(some: slice) -> list[dict]:
    return [
      share(written_margins(weighed[examples][some], 'likelihood', use, lengths[examples]) > 0)
      for use in USES
      for examples in EXAMPLES
    ]

  out = []
  for place, trait in enumerate(character.traits):
    cells = [f'{round(f["mean"] * f["n"])} of {f["n"]}' if f else '' for f in right(slice(place, place + 1))]
    out.append(' | '.join([f'{character.name}: {trait.id}', *cells]))
  cells = [f'{f["mean"]:.2f} ({f["low"]:.2f} to {f["high"]:.2f})' if f else '' for f in right(slice(None))]
  out.append(' | '.join([f'**{character.name}, all**; length by {", ".join(lengths.values())}', *cells]))
  return [f'| {row} |' for row in out]


def main(arguments: Sequence[str]) -> None:
  chosen = [characters.load(name) for name in arguments[1:] or ['assistant']]
  config = defaults.get_config().model
  model = language_model.build(checkpoint_source.load(_MODEL.value), config)
  print('| trait | ' + ' | '.join(f'{use} pairs, {examples} examples' for use in USES for examples in EXAMPLES) + ' |')
  print('|---' * (1 + len(USES) * len(EXAMPLES)) + '|')
  for character in chosen:
    print('\n'.join(rows(model, character)), flush=True)


if __name__ == '__main__':
  app.run(main)
