"""An adaptive sweep: what the next trial changes is asked of an Optuna study, which many workers share.

The study is a journal in the sweep's folder. Every process that is given the command is a worker: it makes one trial
after another, until the study has as many as were asked for. A trial whose worker was killed is taken up by the next
worker that looks for one, and goes on where it was.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from charjax import storage, sweep, workdir
from charjax.errors import UserError

_STUDY, _INSTALL = 'charjax', "pip install 'optuna>=5'"


def work(
  folder: epath.Path,
  total: int,
  suggest: Callable[[Any], list[str]],
  value: Callable[[Mapping[str, Any]], float],
  make: Callable[[str, Sequence[str]], sweep.Trial],
) -> tuple[list[sweep.Trial], list[sweep.Trial]]:
  """Makes trials of the study in `folder` until it has `total`.

  Args:
    folder: of the study and its trials.
    total: how many trials the study is to have, those of all workers together.
    suggest: what an Optuna trial changes, as --config.field=value.
    value: how good an evaluation's summary is; the more the better.
    make: (name, changes) -> a trial.

  Returns:
    All finished trials of the study, the best first, and those that failed.

  Raises:
    UserError: Optuna is not installed, or there is a mistake in what a trial changes.
  """
  optuna = _optuna()
  state = optuna.trial.TrialState
  folder.mkdir(parents=True, exist_ok=True)
  backend = optuna.storages.journal.JournalFileBackend(str(folder / 'study.journal'))
  study = optuna.create_study(
    study_name=_STUDY,
    storage=optuna.storages.JournalStorage(backend),
    direction='maximize',
    load_if_exists=True,
  )

  def made_of(some: Sequence[Any]) -> list[sweep.Trial]:
    return [make(_name(one.number), suggest(optuna.trial.FixedTrial(one.params))) for one in some]

  def finished() -> list[sweep.Trial]:
    return made_of(sorted(study.get_trials(deepcopy=False, states=(state.COMPLETE,)), key=lambda one: -one.value))

  while True:
    with _next(optuna, study, folder, total) as trial:
      if trial is None:
        return finished(), made_of(study.get_trials(deepcopy=False, states=(state.FAIL,)))
      name = _name(trial.number)
      run = make(name, suggest(trial))
      print(f'{name}: {json.dumps(trial.params)}', flush=True)
      if sweep.run([run], 1, made=finished()):
        study.tell(trial, state=state.FAIL)
        continue
      found = value(json.loads((run.session.folder('evaluation') / 'summary.json').read_text()))
      study.tell(trial, found)
      print(f'{name}: {found:.4g}; the best so far is {_name(study.best_trial.number)}: {study.best_value:.4g}')


def _name(number: int) -> str:
  return f'trial-{number:04d}'


@contextlib.contextmanager
def _next(optuna: Any, study: Any, folder: epath.Path, total: int) -> Iterator[Any]:
  """A trial that nobody works on, for as long as this process does; None where there are enough."""
  running = optuna.trial.TrialState.RUNNING
  while True:
    for one in study.get_trials(deepcopy=False, states=(running,)):
      with contextlib.ExitStack() as stack:
        try:
          stack.enter_context(workdir.lock(folder / '.workers' / _name(one.number)))
        except storage.Locked:
          continue
        if study.get_trials(deepcopy=False)[one.number].state == running:  # not finished in the meantime
          yield optuna.trial.Trial(study, one._trial_id)
          return
    enough = False
    with contextlib.suppress(storage.Locked), workdir.lock(folder / '.workers' / 'asking'):
      enough = len(study.get_trials(deepcopy=False)) >= total
      if not enough:
        study.ask()  # for the worker that comes first, which is this one as a rule
    if enough:
      yield None
      return


def _optuna() -> Any:
  try:
    import optuna
  except ImportError as error:
    raise UserError(f'a search needs Optuna, which is not installed; run: {_INSTALL}') from error
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  return optuna
