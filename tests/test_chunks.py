"""A character that is edited: what the edit leaves as it is, is not made again, and the rest is as if made at once."""

import shutil
import subprocess
import sys
from pathlib import Path

from smoke import ROOT, environment

ASSISTANT = ROOT / 'charjax' / 'characters' / 'assistant.toml'
STAGES = ('messages', 'replies', 'rankings')
_PROGRAM = 'import sys; from charjax.main import main; sys.exit(any(main([s, *sys.argv[1:]]) for s in {stages}))'


def make(workdir: Path, character: Path) -> None:
  done = subprocess.run(
    [sys.executable, '-c', _PROGRAM.format(stages=STAGES), f'--config={ROOT / "configs" / "smoke.py"}',
     f'--workdir={workdir}', f'--config.character.path={character}', '--config.character.traits=ai_nature,honesty'],
    env=environment(), capture_output=True, text=True, timeout=600, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]


def kept(workdir: Path) -> dict[str, int]:
  """When each chunk was written."""
  return {
    f'{stage}/{path.name}': path.stat().st_mtime_ns for stage in STAGES for path in workdir.glob(f'{stage}/chunks/*')
  }


def test_another_wording_of_one_trait_makes_only_what_showed_it(smoke_run, tmp_path):
  run = tmp_path / 'run'
  shutil.copytree(smoke_run[0], run)
  before = kept(run)
  text = ASSISTANT.read_text()
  start = text.index('statement = "', text.index('id = "honesty"')) + len('statement = "')
  edited = tmp_path / 'edited.toml'
  edited.write_text(text[:start] + 'I am frank with people. ' + text[start:])
  make(run, edited)
  after = kept(run)
  made = {name for name, time in after.items() if before.get(name) != time}
  # Messages are written from seeds. Of the replies those with honesty shown, and its rankings and audit, are new.
  assert {name.rsplit('-', 2)[0] for name in made} == {
    'replies/honesty-shown',
    'rankings/rank-honesty',
    'rankings/audit',
  }
  assert sum(name.startswith('rankings/audit') for name in made) == 1
  # What the old wording had made is gone: as many chunks stand there, and each was needed.
  assert len(after) == len(before)

  make(tmp_path / 'new', edited)
  assert kept(tmp_path / 'new').keys() == after.keys()
  for product in ('messages/messages.jsonl', 'replies/replies.jsonl', 'rankings/rankings.jsonl', 'rankings/audit.json'):
    assert (run / product).read_bytes() == (tmp_path / 'new' / product).read_bytes(), product
