"""The command line: reads flags, checks everything a run will need, then hands over to the stages."""

from __future__ import annotations

import contextlib
import errno
import getpass
import json
import os
import re
import shlex
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags
from etils import epath

from charjax import character as characters
from charjax import defaults, files, hosts, interrupts, limits, start, starting_model, storage, watch
from charjax import workdir as workdirs
from charjax.config_file import merge, nearest, override, read_config, read_sweep
from charjax.errors import Passing, UserError, one_line
from charjax.stages import STAGES
from charjax.terminal import is_unread, print_nowhere, printable

_USAGE = f"""charjax: train a character into a language model

  charjax run --config=FILE.py --workdir=DIR     the whole loop, stage by stage
  charjax STAGE --config=FILE.py --workdir=DIR   one of {', '.join(stage.name for stage in STAGES)}
  charjax sweep --config=SWEEP.py[:CONFIG]       runs that differ in some settings, and the page that compares them
  charjax compare DIR DIR...                     what differs between runs, beside what each did
  charjax plan --config=FILE.py --topology=NAME  what a run would take on chips that are not there: v5e:4x4, h100:8
  charjax chat MODEL|DIR [--side_by_side]        talk to a model, or to what the run in DIR made of it
  charjax export MODEL|DIR [--output=DIR]        a Hugging Face directory of a model, or of what the run in DIR made
  charjax report --workdir=DIR                   the page of the run in DIR made anew, by its own config
  charjax review --workdir=DIR                   judge what the run in DIR made, blind, on a page of this machine
  charjax character check FILE [--preview=2]     what is wrong with a character's examples; what the model makes of it
  charjax character diff A B                     what differs between two characters, or those of two runs
  charjax help                                   this text

  --config=FILE.py[:argument][,field=value...]   a config file, what its get_config takes, and changes
  --config.some.field=value                      a change of one field
  --workdir=DIR                                  where the run lives, in a folder or gs://BUCKET/FOLDER;
                                                 the same command goes on with it
  --side_by_side [--trait=ID]                    chat: the model, shown its character (or one trait), and trained
  --temperature=0.7 --max_new_tokens=512 --seed=0   chat: how replies are drawn
  --model=policy|preference|judge|start|adapter  export: the policy, what rewarded it, what judged it, or the beginning;
                                                 or the policy's LoRA alone, for PEFT
  --dtype=bfloat16|float32                       export: of the weights
  --parallel=1 --launch=FILE [--tpu]             sweep: trials at a time; or only write their commands, one a line,
                                                 or launches of slices of a TPU by tpu/babysit.sh
  --trials=20                                    sweep: of a search, by all processes that were given the command
  --preview=N [--config=FILE.py]                 character check: messages a trait that the model writes and answers
  --topology=NAME --json                         plan: the chips; or figures alone, as JSON
  --reviewer=NAME --port=0                       review: who judges, and where the page is
  --coordinator=HOST:PORT --processes=N --process=I   run, or a stage: one of many processes, each on its own devices;
                                                 a TPU pod, Slurm and Open MPI say it by themselves

A finished stage is skipped, one that was cut off goes on, one whose inputs or settings changed is made anew.
"""

# Commands that have flags of their own.
_FLAGS_OF = {
  'chat': ('side_by_side', 'trait', 'temperature', 'max_new_tokens', 'seed'),
  'export': ('output', 'model', 'dtype'),
  'review': ('reviewer', 'port'),
  'sweep': ('parallel', 'launch', 'tpu', 'trials'),
  'compare': ('output',),
  'character': ('preview',),
  'plan': ('topology', 'json'),
  'run': ('coordinator', 'processes', 'process'),  # and each stage
}

_AWAY = 'move it away, or choose another --workdir'
_ALLOW = 'make it writable, or choose another --workdir'
# What a disk may answer at any time, and what can be done. All that was finished before is kept.
_DISK = {
  errno.ENOSPC: 'free some space',
  errno.EDQUOT: 'free some space',
  errno.EIO: 'look after the disk',
  errno.EROFS: _ALLOW,
  errno.EACCES: _ALLOW,
  errno.EPERM: _ALLOW,
  errno.EISDIR: _AWAY,
  errno.ENOTDIR: _AWAY,
  errno.ENAMETOOLONG: 'give it a shorter name',
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command.

  Args:
    argv: the arguments, without the program's name; those of the process by default.

  Returns:
    The exit code: 0, 1 (a check found problems), 2 (a mistake of the user's), 141 (nobody reads what is printed), 130
    (interrupted by Ctrl-C), 143 (by SIGTERM), 75 (a bucket or the hub does not answer; of many processes also: one was
    lost, they hung, did not find each other or their devices, or others hold the folder). After the last three the
    same command goes on.
  """
  arguments = list(sys.argv[1:] if argv is None else argv)
  try:
    code = _command(arguments)
    sys.stdout.flush()
    watch.finish()
    hosts.leave()
    return code
  except BaseException as error:
    told = _told(error)
    if told is None:
      watch.end(1, ' '.join(traceback.format_exception_only(error)[-1].split()), traceback.format_exc())
      raise
    code, line = told[0], ' '.join(printable(told[1]).split())  # It may quote other people's files.
    if isinstance(error, BrokenPipeError):
      print_nowhere()
    watch.end(code, line)
    if any(thread.name == interrupts.LEFT for thread in threading.enumerate()):
      hosts.exit_now(code, line)  # It may be long at it, and Python would wait.
    if isinstance(error, SystemExit):
      raise
    if line:
      print(f'charjax: {line}', file=sys.stderr)
    return code


def _told(error: BaseException) -> tuple[int, str] | None:
  """The exit code and the line that an error ends in; None: nobody expected it."""
  if isinstance(error, UserError):
    # Of many processes, one that was just ended may still hold the folder.
    code = hosts.LOST if isinstance(error, storage.Locked) and hosts.count() > 1 else 2
    return code, str(error)
  if isinstance(error, Passing):
    return hosts.LOST, str(error)
  # What reads buckets has an error of its own, which it raises once it has tried for long.
  if isinstance(error, Exception) and type(error).__module__.startswith('gcsfs.'):
    return hosts.LOST, one_line(error)
  if isinstance(error, OSError) and error.errno in _DISK:
    where = error.filename or 'the disk'
    return 2, f'{where}: {error.strerror}; {_DISK[error.errno]}, then give the same command again'
  # Of the devices: an allocation that was too large, while compiling or running.
  if isinstance(error, RuntimeError) and 'RESOURCE_EXHAUSTED' in str(error):
    return 2, (
      f'the devices are out of memory ({one_line(error)}); lower the batch of the stage that was at work '
      '(batch_size, messages_per_batch, prompts_per_step), raise its microbatches, set config.model.remat=True or '
      'split the model by config.mesh, then give the same command again'
    )
  if isinstance(error, KeyboardInterrupt):
    return 143 if isinstance(error, interrupts.Terminated) else 130, str(error) or 'interrupted'
  if isinstance(error, SystemExit) and isinstance(error.code, int):
    return error.code, ''
  if isinstance(error, BrokenPipeError) and is_unread():  # As of `charjax compare A B | head`; other pipes are ours.
    return 141, ''
  return None


def _command(arguments: list[str]) -> int:
  if {'--help', '-h', '-help', '--helpfull'} & set(arguments) or arguments[:1] == ['help']:
    print(_USAGE, end='')
    return 0
  names, config_spec, folders, changes, options = _parse(arguments)
  workdir = folders[-1] if folders else ''
  if not names:
    raise UserError('no command given; `charjax help` lists them')
  known = [stage.name for stage in STAGES]
  command, *rest = names
  own = _FLAGS_OF.get('run' if command in known else command, ())
  if wrong := [name for name in options if name not in own]:
    other = next(other for other, theirs in _FLAGS_OF.items() if wrong[0] in theirs)
    raise UserError(f'--{wrong[0]} is a flag of charjax {other}; `charjax help` lists those of {command}')
  if command == 'character':
    return _character(rest, config_spec, changes, options)
  if command == 'chat':
    return _chat(rest, config_spec, workdir, changes, options)
  if command == 'export':
    return _export(rest, config_spec, workdir, changes, options)
  if command == 'compare':
    return _compare([*rest, *folders], config_spec or ''.join(changes[:1]), options)
  if command not in ('run', 'review', 'sweep', 'plan', *known):
    raise UserError(f'there is no command {command}{nearest(command, ["run", *_FLAGS_OF, *known])}')
  if rest:
    raise UserError(f'unexpected argument {rest[0]}; flags begin with --, and `charjax help` lists them')
  if command == 'review':
    return _review(config_spec or ''.join(changes[:1]), workdir, options)
  if command == 'report' and workdir and not (config_spec or changes):
    return _report(storage.place(workdir))
  if not config_spec:
    raise UserError(f'charjax {command} needs --config=FILE.py')
  if command == 'sweep':
    return _sweep(config_spec, changes, workdir, options)
  if command == 'plan':
    return _plan(read_config(config_spec, changes), options)
  if not workdir:
    raise UserError(f'charjax {command} needs --workdir=DIR')
  chosen = STAGES if command == 'run' else tuple(stage for stage in STAGES if stage.name == command)
  if hosts.join(options.get('coordinator', ''), options.get('processes'), options.get('process')):
    watch.begin()
  with interrupts.raising():
    start.run(chosen, read_config(config_spec, changes), storage.place(workdir))
  return 0


def _character(rest: Sequence[str], config_spec: str, changes: Sequence[str], options: dict[str, Any]) -> int:
  if rest[:1] == ['diff'] and len(rest) == 3 and not options:
    from charjax import character_diff

    print(character_diff.diff(*(character_diff.read(path) for path in rest[1:])) or 'They do not differ.')
    return 0
  if rest[:1] != ['check'] or len(rest) != 2:
    raise UserError('charjax character takes `check FILE` or `diff A B`')
  from charjax import character_lint

  character = characters.load(rest[1])
  findings = character_lint.lint(character)
  print(printable(character_lint.format_table(findings)), flush=True)
  if 'preview' in options:
    changes = [f'--config.character.path={rest[1]}', *changes]
    config = read_config(config_spec, changes) if config_spec else override(_defaults(), changes)
    limits.check(config)
    starting_model.check(config.model)
    character = characters.select(character, config.character.traits)
    from charjax import character_preview

    with start.devices(config):
      for text in character_preview.preview(workdirs.Session(config, character, epath.Path()), options['preview']):
        print(text, flush=True)
  return int(any(finding.problems for finding in findings))


def _chat(rest: Sequence[str], config_spec: str, workdir: str, changes: Sequence[str], options: dict[str, Any]) -> int:
  """Talks to what is named in one of three ways: a model or a run folder, --workdir or --config."""
  given = [*rest, *filter(None, [workdir, config_spec])]
  if len(given) != 1:
    raise UserError('charjax chat takes a model or a run folder, or --config=FILE.py: one of them')
  if 'trait' in options and not options.get('side_by_side'):
    raise UserError('--trait goes with --side_by_side, where it is shown to the model')
  place = epath.Path() if config_spec else _place(given[0])
  config, trained = (read_config(config_spec, changes), False) if config_spec else _at(given[0], bool(workdir), changes)
  if trained:
    instead = f'or talk to the model that it starts from: charjax chat {config.model.path}'
    starting_model.check_trained(place, f'run charjax policy, {instead}')
  session = start.prepare(config, place)
  from charjax import chat
  from charjax.model import hub

  drawn = {name: config.evaluation[name] for name in ('temperature', 'top_p', 'top_k')} | {'max_new_tokens': 512}
  with start.devices(config):
    if hub.is_address(config.model.path):
      session.checkpoint  # noqa: B018  (bars of a download do not go into the lines of a conversation)
    chat.run(session, trained, chat.Settings(**drawn | options))
  return 0


def _export(
  rest: Sequence[str], config_spec: str, workdir: str, changes: Sequence[str], options: dict[str, Any]
) -> int:
  """Exports from what is named in one of two ways: a model or a run folder, or --workdir with or without --config."""
  given = [*rest, *filter(None, [workdir])]
  if len(given) != 1 or (rest and config_spec):
    raise UserError('charjax export takes a model or a run folder, or --workdir=DIR with or without --config=FILE.py')
  place = _place(given[0])
  config, is_run = (read_config(config_spec, changes), True) if config_spec else _at(given[0], bool(workdir), changes)
  kind = options.get('model', 'policy' if is_run else 'start')
  if kind != 'start' and not is_run:
    raise UserError(f'--model={kind}: {place} is a model and no run; leave the flag out, or give the folder of a run')
  output = options.get('output') or (str(place / f'export{"" if kind == "policy" else f"-{kind}"}') if is_run else '')
  if not output:
    raise UserError('charjax export of a model needs --output=DIR')
  if '://' in output:
    raise UserError(f'--output={output}: charjax export writes to this machine; give --output=DIR, and copy that')
  session = start.prepare(config, place)
  if is_run:
    start.pin(session)
  from charjax.export.models import export

  # The starting model goes from file to file.
  with contextlib.nullcontext() if kind == 'start' else start.devices(config):
    export(session, kind, options.get('dtype', 'bfloat16'), epath.Path(os.path.expanduser(output)))
  return 0


def _place(named: str) -> epath.Path:
  """What a person calls a run folder or a model."""
  from charjax.model import hub

  return epath.Path(named) if hub.is_address(named) else storage.place(named)


def _defaults() -> ml_collections.ConfigDict:
  config = defaults.get_config()
  config.lock()
  return config


def _at(where: epath.PathLike, wants_run: bool, changes: Sequence[str]) -> tuple[ml_collections.ConfigDict, bool]:
  """The config of what is at a place, and whether that is a run, which has its own, or a model."""
  named = os.path.expanduser(os.fspath(where))
  place = epath.Path(named)
  record = starting_model.read_run(named) if wants_run else starting_model.read_record(named)
  config = _defaults()
  here = config.mesh, config.model.attention
  if record is None:
    starting_model.check_path(named)
    config.model.path = named
  else:
    merge(config, record, str(place / 'config.json'), '')
    config.character.path = str(place / 'character.toml')
    # The machines that it was trained on need not be like this one.
    config.mesh, config.model.attention = here
  return override(config, changes), record is not None


def _review(config: str, workdir: str, options: dict[str, Any]) -> int:
  if config:
    raise UserError(f'charjax review takes no config ({config}): the run in --workdir=DIR has its own')
  if not workdir:
    raise UserError('charjax review needs --workdir=DIR, the folder of a finished run')
  if '://' in workdir:  # Object stores cannot take a line at a time.
    raise UserError(f'--workdir={workdir}: charjax review needs a folder of this machine; copy the run here')
  try:
    reviewer = options.get('reviewer') or getpass.getuser()
  except (OSError, KeyError) as error:  # Who works under a number that has no name.
    raise UserError('charjax review needs --reviewer=NAME') from error
  from charjax.review import server

  server.serve(epath.Path(os.path.expanduser(workdir)), reviewer, options.get('port', 0))
  return 0


def _report(place: epath.Path) -> int:
  """Makes the page of a run from what stands in its folder, whatever config it was made with."""
  starting_model.read_run(place)
  from charjax.stages import report

  with workdirs.lock(place):
    report.make_anew(place)
  print(report.console_summary(place))
  return 0


def _sweep(config_spec: str, changes: Sequence[str], workdir: str, options: dict[str, Any]) -> int:
  """Makes the trials of a sweep or a search, or writes their commands."""
  from charjax import sweep

  found = read_sweep(config_spec, changes)
  folder = os.path.expanduser(workdir or os.path.join('runs', found.name))
  root, launch = epath.Path(folder), options.get('launch')

  def make(name: str, own: Sequence[str]) -> sweep.Trial:
    place = os.path.join(folder, name)
    session = start.prepare(read_config(found.base, [*found.changes, *own]), epath.Path(place), elsewhere=bool(launch))
    starting_model.check_apart(session.config.model, session.workdir)
    pinned = [] if launch else sweep.pin_model(root, session)
    command = ['run', f'--config={found.base}', *found.changes, *own, *pinned, f'--workdir={place}']
    return sweep.Trial(name, session, command)

  if (
    wrong := [name for name in ('parallel', 'launch', 'tpu') if name in options]
    if found.search
    else (['trials'] if 'trials' in options else [])
  ):
    why = 'gives one trial after another; give the command several times' if found.search else 'names its trials'
    raise UserError(f'--{wrong[0]}: {config_spec} {why}, and leave the flag out')
  if options.get('tpu') and not launch:
    raise UserError('--tpu goes with --launch=FILE: a slice is asked for by whoever gives a command of that file')
  if launch:
    trials = [make(name, own) for name, own in found.trials.items()]
    commands = [['charjax', *trial.command] for trial in trials]
    if options.get('tpu'):
      commands = sweep.launches(trials, root, found.base)
    lines = [shlex.join(command) for command in commands]
    files.write_text(os.path.expanduser(launch), ''.join(line + '\n' for line in lines))
    print(f'{len(lines)} commands: {launch}')
    return 0
  if '://' in folder:
    raise UserError(f'--workdir={folder}: charjax sweep needs a folder of this machine; or give --launch=FILE')
  if found.search:
    from charjax import search

    finished, failed = search.work(root, options.get('trials', 20), *found.search, make)
    sweep.write_record(root, found.base, finished)
  else:
    trials = [make(name, own) for name, own in found.trials.items()]
    with workdirs.lock(root):
      sweep.write_record(root, found.base, trials)
      failed = sweep.run(trials, options.get('parallel', 1))
    finished = [trial for trial in trials if trial not in failed]
  if finished:
    _tell_apart([trial.session.workdir for trial in finished], root / 'comparison' / 'index.html')
  for trial in failed:
    print(f'charjax: trial {trial.name} failed; see {trial.log}', file=sys.stderr)
  return int(bool(failed))


def _plan(config: ml_collections.ConfigDict, options: dict[str, Any]) -> int:
  """Says what a run would take; nothing is read but the config, unless it does not tell the model's shape."""
  if not options.get('topology'):
    raise UserError('charjax plan needs --topology=NAME, as v5e:4x4 or h100:8')
  limits.check(config)
  starting_model.check_quantize(config.model)
  character = characters.select(characters.load(config.character.path), config.character.traits)
  # Programs are compiled for other devices than this machine's, which it may not even have.
  os.environ['JAX_PLATFORMS'] = 'cpu'
  import jax

  from charjax import chips
  from charjax.plan import estimate

  jax.config.update('jax_platforms', 'cpu')
  # A program for chips that are not there can be put into the cache and not taken out again.
  jax.config.update('jax_enable_compilation_cache', False)
  jax.config.update('jax_default_matmul_precision', 'highest')  # As in start.devices.
  topology = chips.find(options['topology'])
  if topology.devices is None:
    jax.config.update('jax_num_cpu_devices', topology.size)
  shape = limits.told_shape(config) or starting_model.load(config.model).config
  limits.check_model(config, shape)
  plan = estimate.make(
    config, character, shape, topology, lambda name: print(f'{name} ...', file=sys.stderr, flush=True)
  )
  print(json.dumps(plan.as_json()) if options.get('json') else estimate.as_text(plan))
  return 0


def _compare(folders: Sequence[str], config: str, options: dict[str, Any]) -> int:
  """Compares runs, or the trials of sweeps."""
  from charjax import sweep

  if config:
    raise UserError(f'charjax compare takes no config ({config}): each run has its own')
  runs = [run for folder in folders for run in sweep.trials_of(storage.place(folder))]
  if len(runs) < 2:
    raise UserError('charjax compare needs the folders of two runs or more, or that of a sweep')
  output = options.get('output')
  _tell_apart(runs, storage.place(output) if output else runs[0].parent / 'comparison' / 'index.html')
  return 0


def _tell_apart(runs: Sequence[epath.Path], output: epath.Path) -> None:
  from charjax.report import compare

  print(compare.write(runs, output))


# ---- flags and config ----


def _parse(arguments: Sequence[str]) -> tuple[list[str], str, list[str], list[str], dict[str, Any]]:
  """Splits arguments into (command words, --config, --workdir's, --config.field=value changes, flags of _FLAGS_OF)."""
  changes, others = [], []
  rest = iter(arguments)
  for argument in rest:
    if not re.match(r'--?(no)?config\.', argument):
      others.append(argument)
    elif '=' in argument or re.match(r'--?noconfig\.', argument):
      changes.append(argument)
    else:
      value = next(rest, None)
      if value is None:
        raise UserError(f'{argument} has no value; write {argument}=VALUE')
      changes.append(f'{argument}={value}')
  values = flags.FlagValues()
  values.set_gnu_getopt(True)
  flags.DEFINE_string('config', '', 'a config file', flag_values=values)
  flags.DEFINE_multi_string('workdir', [], 'the run folder, or those of several', flag_values=values)
  flags.DEFINE_bool('side_by_side', None, 'all models answer', flag_values=values)
  flags.DEFINE_string('trait', None, 'whose statement is shown', flag_values=values)
  flags.DEFINE_float('temperature', None, 'of the draws', lower_bound=0.0, upper_bound=100.0, flag_values=values)
  flags.DEFINE_integer('max_new_tokens', None, 'of a reply', lower_bound=1, flag_values=values)
  flags.DEFINE_integer('seed', None, 'of the draws', lower_bound=0, upper_bound=2**31 - 1, flag_values=values)
  flags.DEFINE_string('output', None, 'where an export is written', flag_values=values)
  flags.DEFINE_enum(
    'model', None, ['policy', 'adapter', 'preference', 'judge', 'start'], 'what is exported', flag_values=values
  )
  flags.DEFINE_enum('dtype', None, ['bfloat16', 'float32'], 'of exported weights', flag_values=values)
  flags.DEFINE_integer('preview', None, 'messages a trait', lower_bound=1, upper_bound=100, flag_values=values)
  flags.DEFINE_integer('parallel', None, 'trials at a time', lower_bound=1, upper_bound=1000, flag_values=values)
  flags.DEFINE_integer('trials', None, 'of a search', lower_bound=1, upper_bound=10**6, flag_values=values)
  flags.DEFINE_string('launch', None, 'where the commands of trials are written', flag_values=values)
  flags.DEFINE_bool('tpu', None, 'each on a slice of its own', flag_values=values)
  flags.DEFINE_string('topology', None, 'the chips of a plan', flag_values=values)
  flags.DEFINE_bool('json', None, 'figures alone', flag_values=values)
  flags.DEFINE_string('reviewer', None, 'who judges', flag_values=values)
  flags.DEFINE_integer('port', None, 'of the page', lower_bound=0, upper_bound=2**16 - 1, flag_values=values)
  flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0', flag_values=values)
  flags.DEFINE_integer('processes', None, 'how many', lower_bound=1, flag_values=values)
  flags.DEFINE_integer('process', None, 'which of them this is', lower_bound=0, flag_values=values)
  try:
    names = values(['charjax', *others])[1:]
  except flags.Error as error:
    raise UserError(f'{error}; `charjax help` lists the flags') from error
  # Libraries that define absl flags of their own (Orbax, Grain) read the defaults.
  flags.FLAGS(['charjax'], known_only=True)
  special = [name for names in _FLAGS_OF.values() for name in names]
  options = {name: values[name].value for name in special if values[name].value is not None}
  if options.get('temperature') != options.get('temperature'):  # A NaN is within all bounds.
    raise UserError('flag --temperature=nan: give a number, 0 or above')
  return names, values.config, values.workdir, changes, options


if __name__ == '__main__':
  sys.exit(main())
