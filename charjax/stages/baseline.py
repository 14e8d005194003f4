"""baseline: what the starting model says to the held-out messages, and how likely it finds what is written.

Reads the character, messages/ and preference/; writes baseline/replies.jsonl and baseline/measures.json, by condition
(conditions.py). No policy has a part in it: those that are trained on the same preference models share it.
"""

import json

from charjax.files import Row, write_jsonl, write_text
from charjax.progress import Progress
from charjax.stages import conditions
from charjax.stages.conditions import STARTING
from charjax.workdir import Session


def run(session: Session) -> Row:
  """Draws and judges replies and scores what is written, in all conditions but `trained`; returns counts."""
  folder = session.folder('baseline')
  drawn = conditions.draw(session, 'baseline', STARTING, None)
  write_jsonl(folder / 'replies.jsonl', drawn)
  with Progress('baseline', len(STARTING) * conditions.parts_of_measure(session), 'parts') as bar:
    measures = {condition: conditions.measure(session, condition, None, bar) for condition in STARTING}
  write_text(folder / 'measures.json', json.dumps(measures))
  return {'replies': len(drawn)}
