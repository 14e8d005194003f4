"""behaviour: is the character a nudge or a rule, does it last, and what came along with it?

Reads the character, messages/, preference/, policy/ and evaluation/; writes to behaviour/ replies.jsonl, answers.jsonl
(to the questions of the set preference) and summary.json. The starting and the trained model (`base` and `trained`)
answer the same prompts by the same draws; every figure is {mean, low, high, n}, delta paired by prompt, or by message
where several prompts hold it.
`config.behaviour.sets` says what is looked into:

  likelihood    each trait in the evaluation's own replies, in every condition, by the ratio below: what people say
                of them stands beside it
  rigidity      each trait in replies to its own messages, to requests that have nothing to do with it
                (unrelated.jsonl), and to its own messages where the user asks for a plain style (forms.jsonl, plain)
  robustness    each trait where the prompt asks to drop the character or for another format (forms.jsonl, drop and
                format), and turn by turn in a conversation of its messages
  side_effects  habits that words give away (users.jsonl, habits.py), how far a stance follows the user's (views.jsonl)
  preference    which ways to be the model chooses (revealed.py)

The files lie in charjax/behaviour/, one JSON object a line. unrelated: message. forms: kind, name, form (where
{message} stands for the message) and perhaps system. users: kind, message and, where a fact is at stake, right (a
regular expression). views: question, and what two users say before it: one is for it, other against.

How much of a trait a reply has is told by two figures: the log-likelihood ratio a token of the reply with the trait
shown against its opposites shown, and the held-out judge's score in its spreads. Both are told the message alone,
without what the prompt asked besides. The judge was fitted to replies to each trait's own messages: on others the
ratio says more.
"""

import functools
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from charjax.chunks import chunks
from charjax.engine.batch import item_keys
from charjax.engine.sample import as_told, sample
from charjax.engine.score import score
from charjax.files import Row, read_jsonl, write_jsonl, write_text
from charjax.progress import Progress
from charjax.stages import conditions, evaluation, messages, policy, preference, prompts, revealed
from charjax.stages.habits import HABITS
from charjax.stages.rankers import Answer, Settings, evidence, treat_length
from charjax.stages.statistics import interval, ratio
from charjax.training.heads import bind
from charjax.workdir import Session, fingerprint

MODELS = revealed.MODELS
_FILES = epath.Path(__file__).parent.parent / 'behaviour'
_MEASURES = ('likelihood', 'judge')


def read(name: str) -> list[Row]:
  """The rows of a file of charjax/behaviour/."""
  return read_jsonl(_FILES / f'{name}.jsonl')


def run(session: Session) -> Row:
  """Draws and measures replies to the prompts of the sets that the config names; returns counts."""
  config, folder = session.config.behaviour, session.folder('behaviour')
  rows: list[Row] = []
  summary: Row = {}
  if config.sets:
    trained = policy.load(session)
    rows = _draw(session, _asked(session), trained)
    rows += _converse(session, trained) if 'robustness' in config.sets else []
    evaluated = _evaluated(session, config.sets)
    measured = _measure(session, [*evaluated, *(row for row in rows if row['set'] not in ('users', 'views'))])
    if 'likelihood' in config.sets:
      read_again = [row for row in measured if row['set'] == 'evaluated']
      rows += read_again
      summary['likelihood'] = likelihood(read_again)
    measured = [_own(row) if row['set'] == 'evaluated' else row for row in measured]
    if 'rigidity' in config.sets:
      summary['rigidity'] = rigidity(measured)
    if 'robustness' in config.sets:
      summary['robustness'], summary['drift'] = robustness(measured), drift(measured)
    if 'side_effects' in config.sets:
      summary['side_effects'] = side_effects(rows) | {'stance_shift': _stance(session, trained)}
    if 'preference' in config.sets:
      options = revealed.options(session.character)
      answers = revealed.ask(session, trained)
      write_jsonl(folder / 'answers.jsonl', [row for some in answers.values() for row in some])
      summary['preference'] = {'options': options} | revealed.summarise([o['id'] for o in options], answers)
  write_jsonl(folder / 'replies.jsonl', rows)
  write_text(folder / 'summary.json', json.dumps(summary, indent=2))
  return {'replies': len(rows), 'sets': list(config.sets)}


# ---- what is asked ----


def _held_out(session: Session) -> dict[str, list[Row]]:
  """The first held-out messages of each trait, as many as the config says."""
  found: dict[str, list[Row]] = {trait.id: [] for trait in session.character.traits}
  for row in messages.load(session):
    if row['split'] == 'heldout' and row['trait'] and len(found[row['trait']]) < session.config.behaviour.messages:
      found[row['trait']].append(row)
  return found


def _asked(session: Session) -> list[Row]:
  """What both models are asked once: set, name within it, trait or None, message, and the whole prompt."""
  config = session.config.behaviour
  found: list[Row] = []

  def add(group: str, name: str, trait: str | None, message: str, before: prompts.Messages, said: str) -> None:
    prompt = [*before, prompts.user(said)]
    # Named by what is asked: its draws stay what they are when a set or a number of prompts changes.
    found.append({'id': f'{group}/{name}/{trait or ""}/{fingerprint(prompt)[:16]}', 'set': group, 'name': name,
                  'trait': trait, 'message': message, 'prompt': prompt})  # fmt: skip

  if 'rigidity' in config.sets:
    for row in read('unrelated')[: config.prompts]:
      add('unrelated', '', None, row['message'], [], row['message'])
  kinds = {'rigidity': ('plain',), 'robustness': ('drop', 'format')}
  wanted = [kind for name in config.sets for kind in kinds.get(name, ())]
  for form in read('forms'):
    if form['kind'] in wanted:
      before = [{'role': 'system', 'content': form['system']}] if form.get('system') else []
      for trait, rows in _held_out(session).items():
        for row in rows:
          said = form['form'].replace('{message}', row['text'])
          add(form['kind'], form['name'], trait, row['text'], before, said)
  if 'side_effects' in config.sets:
    for kind, rows in _by(read('users'), 'kind').items():
      for row in rows[: config.prompts]:
        add('users', kind, None, row['message'], [], row['message'])
        found[-1]['right'] = row.get('right')
    for row in read('views')[: config.prompts]:
      for user in ('one', 'other'):
        said = f'{row[user]} {row["question"]}'
        add('views', user, None, said, [], said)
        found[-1]['question'] = row['question']
  return found


def _by(rows: Sequence[Row], key: str) -> dict[Any, list[Row]]:
  found: dict[Any, list[Row]] = defaultdict(list)
  for row in rows:
    found[row[key]].append(row)
  return found


# ---- replies ----


def _say(session: Session, condition: str, trained: Any, items: Sequence[Row], _: int) -> list[Row]:
  """A reply of one model to each item's prompt."""
  config, model = session.config.evaluation, session.model
  settings = as_told(config)
  decoder, adapter = bind(model.decoder, trained if condition == 'trained' else None)
  drawn = sample(
    decoder,
    [model.prompt(item['prompt']) for item in items],
    item_keys(session.config.seed, 'behaviour', [item['id'] for item in items]),
    model.eos_ids,
    settings,
    adapter=adapter,
    width=config.prompt_width,
  )
  return [
    {key: value for key, value in item.items() if key != 'prompt'}
    | {'condition': condition, 'text': model.text(reply.tokens), 'finish': reply.finish}
    for item, reply in zip(items, drawn, strict=True)
  ]


def _draw(session: Session, asked: Sequence[Row], trained: Any) -> list[Row]:
  found: list[Row] = []
  with Progress('behaviour', 2 * len(asked), 'replies') as bar:
    for condition in MODELS:
      make = functools.partial(_say, session, condition, trained)
      size = session.config.evaluation.batch_size
      found += chunks(session, 'behaviour', condition, asked, size, make, bar)
  return found


def _converse(session: Session, trained: Any) -> list[Row]:
  """Conversations in which a user sends one held-out message of a trait after another; each model answers its own."""
  config = session.config.behaviour
  found: list[Row] = []
  held_out = {trait: rows for trait, rows in _held_out(session).items() if rows}
  total = 2 * config.turns * config.conversations * len(held_out)
  with Progress('conversations', total, 'replies') as bar:
    for condition in MODELS:
      said: dict[str, prompts.Messages] = defaultdict(list)
      for turn in range(config.turns):
        items = []
        for trait, rows in held_out.items():
          for number in range(config.conversations):
            # Each begins elsewhere: else turns would differ by their messages.
            text = rows[(turn + number * max(1, len(rows) // config.conversations)) % len(rows)]['text']
            name = f'{trait}/{number}'
            items.append({'id': f'drift/{name}/{turn}', 'set': 'drift', 'name': name, 'turn': turn, 'trait': trait,
                          'message': text, 'prompt': [*said[name], prompts.user(text)]})  # fmt: skip
        make = functools.partial(_say, session, condition, trained)
        drawn = chunks(session, 'behaviour', f'turn-{turn}-{condition}', items, max(1, len(items)), make, bar)
        for item, row in zip(items, drawn, strict=True):
          said[item['name']] = [*item['prompt'], {'role': 'assistant', 'content': row['text'] or '...'}]
        found += drawn
  return found


def _evaluated(session: Session, sets: Sequence[str]) -> list[Row]:
  """The evaluation's first replies to the same held-out messages, in every condition where the ratio of all is wanted;
  then of the trained model two, as people see."""
  every = 'likelihood' in sets
  if not {'likelihood', 'rigidity', 'robustness'} & {*sets}:
    return []
  wanted = {row['id'] for rows in _held_out(session).values() for row in rows}
  return [
    {'id': row['message'], 'set': 'evaluated', 'name': '', 'trait': row['trait'], 'message': row['prompt'],
     'condition': row['condition'], 'sample': row['sample'], 'text': row['text'], 'finish': row['finish']}
    for row in read_jsonl(session.folder('evaluation') / 'replies.jsonl')
    if row['message'] in wanted
    and (every or row['condition'] in MODELS)
    and row['sample'] < (2 if every and row['condition'] == 'trained' else 1)
  ]  # fmt: skip


def _own(row: Row) -> Row:
  """A reply of the evaluation, where nothing but the message is asked; only the first ones of both models stand beside
  replies to other forms of it."""
  beside = row['condition'] in MODELS and not row['sample']
  return row | {'id': f'own/{row["id"]}', 'set': 'own' if beside else 'evaluated'}


# ---- how much of a trait a reply has ----


def _measure(session: Session, rows: Sequence[Row]) -> list[Row]:
  """Each reply once for its trait, or for every trait where it has none, with `likelihood` and `judge`."""
  model, traits = session.model, session.character.traits
  if not rows:
    return []
  judge = preference.load(session, 'judge')
  report = json.loads((session.folder('preference') / 'report.json').read_text())['judge']
  scores = preference.rewards(session, judge, *conditions.exchanges(model, rows, 'message'))
  settings = Settings(examples=session.config.evaluation.examples)
  found = []
  with Progress('traits in replies', len(traits), 'traits') as bar:
    for place, trait in enumerate(traits):
      mine = [i for i, row in enumerate(rows) if row['trait'] in (None, trait.id)]
      answers = [Answer(rows[i]['message'], rows[i]['text'], rows[i]['finish'] == 'stop') for i in mine]
      ratio, tokens = evidence(model, trait, answers, settings)
      for i, value in zip(mine, treat_length(ratio, tokens, 'mean'), strict=True):
        spread = report['reward_std'][trait.id]
        measured = {'likelihood': float(value), 'judge': float(scores[i, place]) / spread}
        found.append(rows[i] | {'trait': trait.id} | measured)
      bar.advance()
  return found


def _paired(rows: Sequence[Row], measure: str, unit: str) -> tuple[list[Any], dict[str, np.ndarray]]:
  """The values of the field `unit`, between which rows are independent, and each model's mean over its rows of each."""
  by = {c: _by([row for row in rows if row['condition'] == c], unit) for c in MODELS}
  names = [name for name in by['base'] if name in by['trained']]
  return names, {c: np.array([np.mean([row[measure] for row in by[c][name]]) for name in names]) for c in MODELS}


def _figures(rows: Sequence[Row], unit: str = 'id') -> Row:
  """Base, trained and delta of both measures, paired by prompt or another unit."""
  return {measure: evaluation.summarise({**_paired(rows, measure, unit)[1]}) for measure in _MEASURES}


def likelihood(rows: Sequence[Row]) -> Row:
  """By trait, the likelihood ratio of the first reply to each message, in every condition."""
  first = [row for row in rows if not row['sample']]
  return {
    trait: evaluation.summarise(
      {c: np.array([row['likelihood'] for row in some]) for c, some in _by(mine, 'condition').items()}
    )
    for trait, mine in _by(first, 'trait').items()
  }


def rigidity(rows: Sequence[Row]) -> Row:
  """By trait: figures where it is wanted (`own`), where it is not (`unrelated`), and where a plain style was asked
  (`plain`); `spill` is the likelihood's delta in the latter two over that in the first, null unless the first is clear
  of zero."""
  out: Row = {}
  for trait, mine in _by(rows, 'trait').items():
    groups = {name: some for name, some in _by(mine, 'set').items() if name in ('own', 'unrelated', 'plain')}
    out[trait] = {name: _figures(some, 'message') for name, some in groups.items()}
    own = _deltas(groups.get('own', ()))
    effect = interval([*own.values()])
    out[trait]['spill'] = {
      name: _ratio(_deltas(groups[name]), own)
      if effect and effect['low'] is not None and not effect['low'] <= 0 <= effect['high']
      else None
      for name in ('unrelated', 'plain')
      if name in groups
    }
  return out


def _deltas(rows: Sequence[Row], measure: str = 'likelihood', unit: str = 'message') -> dict[str, float]:
  names, values = _paired(rows, measure, unit)
  return dict(zip(names, values['trained'] - values['base'], strict=True))


def _ratio(above: Mapping[str, float], below: Mapping[str, float]) -> Row | None:
  """Mean of one over mean of the other, both by message: of the messages that both have, if there are any in common."""
  shared = [name for name in above if name in below]
  top, bottom = (np.array([v[name] for name in shared or v], np.float64) for v in (above, below))
  return ratio(top, bottom, paired=bool(shared)) if len(top) else None


def robustness(rows: Sequence[Row]) -> Row:
  """By trait: figures of each form of a prompt, '' for the message as it is."""
  kept = [row for row in rows if row['set'] in ('own', 'drop', 'format')]
  return {
    trait: {name: _figures(some) for name, some in _by(mine, 'name').items()}
    for trait, mine in _by(kept, 'trait').items()
  }


def drift(rows: Sequence[Row]) -> Row:
  """By turn: figures over all conversations; `last_less_first`, of the deltas, paired by conversation, of all of them
  and, in `traits`, by trait."""
  rows = [row for row in rows if row['set'] == 'drift']
  turns = _by(rows, 'turn')
  out: Row = {'turns': [{'turn': turn + 1} | _figures(turns[turn]) for turn in sorted(turns)]}
  if len(turns) > 1:
    out['last_less_first'] = _last_less_first(rows)
    out['traits'] = {trait: _last_less_first(mine) for trait, mine in _by(rows, 'trait').items()}
  return out


def _last_less_first(rows: Sequence[Row]) -> Row:
  turns, out = _by(rows, 'turn'), {}
  for measure in _MEASURES:
    first, last = (_deltas(turns[turn], measure, 'name') for turn in (min(turns), max(turns)))
    out[measure] = interval([last[name] - first[name] for name in sorted(first)])
  return out


# ---- side effects ----


def side_effects(rows: Sequence[Row]) -> Row:
  """Each habit as a share of replies by condition, delta paired by prompt; by question where two users ask it."""
  users = [
    row | {'name': 'views' if row['set'] == 'views' else row['name'], 'unit': row.get('question') or row['id'],
           'text': row['text'].replace('\u2019', "'")}
    for row in rows
    if row['set'] in ('users', 'views')
  ]  # fmt: skip
  out = {}
  for habit, (kinds, counts) in HABITS.items():
    out[habit] = _share_of([row | {'hit': counts(row['text'])} for row in users if row['name'] in kinds])
  known = [row for row in users if row.get('right')]
  out['corrects_error'] = _share_of(
    [row | {'hit': bool(re.search(row['right'], row['text'], re.IGNORECASE))} for row in known]
  )
  return out


def _share_of(rows: Sequence[Row]) -> Row:
  names, hits = _paired(rows, 'hit', 'unit')
  tries = len(rows) / max(1, len(MODELS) * len(names))
  return evaluation.summarise_shares({**hits}, dict.fromkeys(MODELS, tries))


def _stance(session: Session, trained: Any) -> Row:
  """How far the log-odds of Yes over No follow the user: those told to the user for it less the other's, by question.

  Exact, with no reply drawn. An even-handed answerer is at 0.
  """
  model, rows = session.model, read('views')[: session.config.behaviour.prompts]
  users = [f'{row[user]} {row["question"]} Answer Yes or No.' for user in ('one', 'other') for row in rows]
  asked = [model.prompt(prompts.alone(text)) for text in users]
  words = [model.reply(word)[:1] for word in ('Yes', 'No')]
  found: dict[str, np.ndarray | None] = {}
  for condition in MODELS:
    decoder, adapter = bind(model.decoder, trained if condition == 'trained' else None)
    said = [word for word in words for _ in asked]
    values = np.array([p.sum() for p in score(decoder, [*asked, *asked], said, adapter=adapter)], np.float64)
    yes, no = np.split(values, 2)
    one, other = np.split(yes - no, 2)
    found[condition] = one - other
  return evaluation.summarise(found)
