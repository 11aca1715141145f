"""The command line: config files, overrides, validation, resume, errors.

    --config=configs/tiny.py:sparse,ppo --config.rl.clip_eps=0.1
        │ load: get_config('sparse,ppo'), then the overrides, type-checked
        ▼
    ConfigDict (locked) ──write──▶ workdir/config.json, compared on resume

Only entry points import this module. Which errors are shown how: a mistake of
the user is a `ValueError` (or `FloatingPointError`, for a run that diverged)
raised by a `raise` statement of this package, or an `OSError` about a file;
`main` prints it as one paragraph and exits with 1. Anything else, a
`ValueError` from inside a library included, is a bug and keeps its traceback.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import difflib
import errno
import importlib.util
import json
import linecache
import os
import pathlib
import re
import secrets
import select
import sys
import traceback
import types
from typing import Any, NoReturn

from absl import app
from absl import flags
from absl import logging
import ml_collections

from stepsearch import paths

_STORED = 'config.json'  # in a workdir
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_FILE_ERRORS = (
    FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
_EXPECTED = {
    bool: 'true or false',
    int: 'an integer',
    float: 'a number',
    str: 'text',
    tuple: "a tuple such as '(1, 2)'",
    type(None): 'a Python literal or text',
}
# What absl says of a flag that has to be given.
_MISSING = re.compile(
    r'flag --(\w+)=None: Flag --\1 must have a value other than None\.')
_BOOLEANS = {'true': True, '1': True, 'false': False, '0': False}


def load(
    path_with_arg: str, overrides: Sequence[str] = ()
) -> ml_collections.ConfigDict:
  """Loads `PATH.py[:arg]`, applies the overrides and locks the result.

  The type of a leaf is that of its default (for a leaf without one, that of
  its `config_dict.placeholder`); int literals are accepted for float leaves,
  `none` for placeholders, and a tuple keeps the type of its first element.

  Args:
    path_with_arg: a file that defines `get_config(arg: str = '')`.
    overrides: `a.b=value` each; of two for the same leaf the last wins.

  Raises:
    ValueError: no such file or variant, unknown leaf, value of another type.
  """
  module, arg = load_file(path_with_arg)
  try:
    config = module.get_config(arg)
  except ValueError as error:
    raise ValueError(f'--config={path_with_arg}: {error}') from error
  return _overridden(config, overrides)


def stored(
    workdir: paths.Address, overrides: Sequence[str] = ()
) -> ml_collections.ConfigDict:
  """The config that a run was started with, overridden as by `load`.

  Args:
    workdir: of the run.
    overrides: as of `load`.

  Raises:
    ValueError: there is no config.json, or it is not what `write` writes.
  """
  path = paths.Path(workdir) / _STORED

  def tuples(value):
    if isinstance(value, list):
      return tuple(map(tuples, value))
    if isinstance(value, dict):
      return {key: tuples(item) for key, item in value.items()}
    return value

  with paths.explained(path):
    text = path.read_text()
  try:
    return _overridden(
        ml_collections.ConfigDict(tuples(json.loads(text))), overrides)
  except json.JSONDecodeError as error:
    raise ValueError(f'{path} is not JSON ({error}): restore it.') from error


def load_file(path_with_arg: str) -> tuple[types.ModuleType, str]:
  """The module of a config file `PATH.py[:arg]`, and the arg.

  Raises:
    ValueError: there is no such file, or it defines no `get_config`.
  """
  match = re.fullmatch(r'(.+?\.py)(?::(.*))?', path_with_arg)
  path = pathlib.Path(match.group(1) if match else path_with_arg)
  if not match or not path.is_file():
    folder = path.parent if path.parent.is_dir() else pathlib.Path('configs')
    present = ', '.join(sorted(map(str, folder.glob('*.py')))) or 'none'
    raise ValueError(
        f'--config={path_with_arg}: there is no such config file; give '
        f'PATH.py or PATH.py:variant. Files in {folder}: {present}.')
  spec = importlib.util.spec_from_file_location(f'config_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'get_config'):
    raise ValueError(
        f"--config={path_with_arg}: {path} defines no get_config(arg=''), "
        'which has to return a ConfigDict.')
  return module, match.group(2) or ''


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """Splits a command line into other arguments and `a.b=value` overrides.

  `--config.a.b=value`, `--config.a.b value` and, for a boolean, `--config.a.b`
  are understood.
  """
  rest, overrides = [], []
  tokens = iter(range(len(argv)))
  for i in tokens:
    name, equals, value = argv[i].partition('=')
    match = re.fullmatch(r'--?config\.(.+)', name)
    if not match:
      rest.append(argv[i])
      continue
    if not equals:
      if i + 1 < len(argv) and not argv[i + 1].startswith('--'):
        value = argv[next(tokens)]
      else:
        value = 'true'
    overrides.append(f'{match.group(1)}={value}')
  return rest, overrides


def main(
    run: Callable[..., Any],
    *,
    takes_config: bool = True,
    takes_files: bool = False,
    config_required: bool = True,
    otherwise: Callable[[Sequence[str]], Any] | None = None,
    argv: Sequence[str] | None = None,
) -> NoReturn:
  """Runs an entry point: flags, config, then `run(config)`; exits.

  To be called under `if __name__ == '__main__':`, after the entry point's own
  absl flags have been defined. Exits with 0, or with 1 after one paragraph on
  stderr for a mistake of the user (see the module's docstring).

  Args:
    run: `run(config)`, or `run()` without `takes_config`, or `run(*files)`.
    takes_config: define `--config` and accept `--config.a.b=value`.
    takes_files: arguments that are no flags go to `run`, of no config.
    config_required: refuse to start without it; else `run(None)`.
    otherwise: where no --config is given, overrides -> the config, such as
      `stored` makes; `config_required` then says nothing.
    argv: the command line, `sys.argv` by default.
  """
  if takes_config:
    flags.DEFINE_string(
        'config', None, 'Config file, PATH.py[:variant]; any leaf of it is '
        'overridden by --config.section.leaf=value.',
        required=config_required and otherwise is None)
  for module, found in list(flags.FLAGS.flags_by_module_dict().items()):
    for flag in found if module.startswith('stepsearch.') else ():
      # --help shows those of the entry point only, wherever it defines them.
      flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  overrides = []

  def parse(argv):
    if takes_config:
      argv, overrides[:] = split_overrides(argv)
    flags.FLAGS.set_gnu_getopt(takes_files)  # flags may follow files
    try:
      rest = flags.FLAGS(argv)
    except flags.Error as error:
      _exit(ValueError(_MISSING.sub(
          r'--\1 is missing: --help tells what it is.', str(error))))
    if not flags.FLAGS['verbosity'].present:
      # Orbax logs a failed save as pages of tracebacks; what matters of them
      # is raised again and arrives here as an error.
      logging.set_verbosity(logging.FATAL)
    return rest

  def guarded(argv):
    try:
      if argv[1:] and not takes_files:
        raise ValueError(
            f'unexpected argument {argv[1]!r}: every argument is a flag, '
            '--name=value.')
      if takes_config and flags.FLAGS.config is None:
        if otherwise is not None:
          with _of_this_version():
            run(otherwise(overrides))
          return
        if overrides:
          raise ValueError(
              f'--config.{overrides[0]} changes a config, but --config names '
              'none.')
        run(None)
      elif takes_config:
        run(load(flags.FLAGS.config, overrides))
      else:
        run(*argv[1:])
    except KeyboardInterrupt:
      sys.exit(130)  # as a shell reports it
    except BrokenPipeError:
      reader = select.poll()
      reader.register(sys.stdout, 0)
      if not reader.poll(0):
        raise
      # Who read what is printed, such as `head`, has left.
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      sys.exit(141)
    except Exception as error:  # pylint: disable=broad-except
      if not is_users(error):
        raise
      _exit(error)

  app.run(guarded, argv=argv, flags_parser=parse)


def commands(
    table: Mapping[str, Callable[[Sequence[str]], NoReturn]],
    otherwise: Callable[[Sequence[str]], NoReturn] | None = None,
    argv: Sequence[str] | None = None,
) -> NoReturn:
  """Runs the command that the first argument names: `PROGRAM NAME --flags`.

  Args:
    table: by name, what defines the flags of a command and calls `main`; it
      gets the command line without the name.
    otherwise: what runs where the first argument is a flag, or there is none.
    argv: the command line, `sys.argv` by default.
  """
  program, *rest = sys.argv if argv is None else argv
  module = f'python -m stepsearch.{pathlib.Path(program).stem}'
  if otherwise is None and rest[:1] in (['--help'], ['-h']):
    print(f'{sys.modules["__main__"].__doc__}\n{module} NAME --help shows the '
          f'flags of each of {", ".join(table)}.')
    sys.exit(0)
  if rest and not rest[0].startswith('-'):
    name = rest.pop(0)
    if name not in table:
      _exit(ValueError(
          f'there is no command {name!r}; there are {", ".join(table)}'
          f'{_did_you_mean(name, list(table))}'))
    table[name]([f'{program} {name}', *rest])
  if otherwise is None:
    _exit(ValueError(
        f'the first argument names what to do: {", ".join(table)}. '
        f'`{module} NAME --help` shows its flags.'))
  otherwise([program, *rest])


@contextlib.contextmanager
def _of_this_version() -> Iterator[None]:
  """Explains a leaf that the config of an older run has not."""
  try:
    yield
  except AttributeError as error:
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    if not pathlib.Path(where).is_relative_to(
        pathlib.Path(ml_collections.__file__).parent):
      raise
    leaf = str(error).strip('"\'')
    raise ValueError(
        'the run was started by another version of StepSearch, and its '
        f'{_STORED} lacks a leaf of this one ({leaf}): name its config file '
        'with --config=configs/….') from error


def is_users(error: Exception) -> bool:
  """Whether the user, rather than a programmer, can do something about it."""
  if isinstance(error, OSError) and not isinstance(error, ConnectionError):
    return isinstance(error, _FILE_ERRORS) or error.errno in _FULL_DISK
  if not isinstance(error, (ValueError, FloatingPointError, ConnectionError)):
    return False
  trace = error.__traceback__
  while trace.tb_next:
    trace = trace.tb_next
  # The innermost frame may be ours because a library hides its own (jax does)
  # or is written in C, hence the look at the statement.
  filename = trace.tb_frame.f_code.co_filename
  statement = linecache.getline(filename, trace.tb_lineno).strip()
  package = pathlib.Path(__file__).resolve().parent
  return (package in pathlib.Path(filename).resolve().parents
          and statement.startswith('raise'))


def require(condition: Any, field: str, value: Any, advice: str) -> None:
  """Refuses a config value unless `condition` holds.

  Args:
    condition: truthy where the value is acceptable.
    field: dotted name of the leaf, e.g. `rl.num_minibatches`.
    value: what the leaf holds.
    advice: what is wrong with it and what would do, a clause or a sentence.

  Raises:
    ValueError: one paragraph with field, value and advice.
  """
  if not condition:
    raise ValueError(f'config.{field} = {value!r}: {advice}')


def choice(field: str, value: Any, options: Sequence[Any]) -> None:
  """Refuses a config value that is none of `options`.

  Raises:
    ValueError: names the field, the value, the options and the nearest one.
  """
  if value not in options:
    raise ValueError(
        f'config.{field} = {value!r} is none of '
        f'{", ".join(map(repr, options))}{_did_you_mean(value, options)}')


def unknown_variant(arg: str, known: Sequence[str]) -> NoReturn:
  """For config files: refuses a variant (the part after `PATH.py:`).

  Raises:
    ValueError: always; names the variant, those known and the nearest one.
  """
  raise ValueError(
      f'unknown variant {arg!r}; this file knows '
      f'{", ".join(map(repr, known)) or "none"} (several are joined by '
      f'commas){_did_you_mean(arg, known)}')


def check_workdir(path: str, flag: str = 'workdir') -> paths.Path:
  """Creates the directory if need be and proves that it can be written.

  Args:
    path: on disk or gs://.
    flag: that gave it, for the message.

  Raises:
    ValueError: it cannot be created or written; names the path and the cause.
  """
  workdir = paths.Path(path)
  # A name of its own: several processes may try at once.
  probe = workdir / f'.writable-{secrets.token_hex(4)}'
  try:
    paths.write(probe, '')
    with paths.explained(probe):
      probe.unlink()
  except ValueError as error:
    raise ValueError(f'--{flag}={path}: {error}') from error
  return workdir


def to_json(config: ml_collections.ConfigDict) -> str:
  """The config as indented JSON with sorted keys (tuples become lists)."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True) + '\n'


def write(
    config: ml_collections.ConfigDict,
    workdir: paths.Address,
    may_change: Sequence[str] = (),
) -> None:
  """Stores `config.json`; on resume checks it against the stored one first.

  Args:
    config: what this run uses.
    workdir: an existing directory.
    may_change: leaves or sections that may differ from the stored config
      (`eval.every`, `checkpoint`); a difference in any other leaf is refused,
      as is a leaf that only one of the two has.

  Raises:
    ValueError: a leaf differs; names it, the stored and the new value.
  """
  path = paths.Path(workdir) / _STORED
  text = to_json(config)
  if path.exists():
    try:
      stored = dict(_leaves(json.loads(path.read_text())))
    except json.JSONDecodeError as error:
      raise ValueError(
          f'{path} is not JSON ({error}): restore it or choose another '
          '--workdir.') from error
    new = dict(_leaves(json.loads(text)))
    for name in sorted(stored.keys() | new.keys()):
      allowed = any(
          name == leaf or name.startswith(leaf + '.') for leaf in may_change)
      before, after = (
          json.dumps(leaves[name]) if name in leaves else 'absent'
          for leaves in (stored, new))
      if before != after and not allowed:
        raise ValueError(
            f'config.{name} is {after}, but the run in {workdir} was started '
            f'with {before} (its config.json): pass the old value to resume '
            'that run, or choose another --workdir for a new one.')
  paths.write(path, text)


def _overridden(
    config: ml_collections.ConfigDict, overrides: Sequence[str]
) -> ml_collections.ConfigDict:
  for override in overrides:
    name, _, text = override.partition('=')
    _override(config, name, text)
  return config.lock()


def _override(config: ml_collections.ConfigDict, name: str, text: str) -> None:
  """Sets leaf `name` from command-line text, or raises ValueError."""
  holder, *_ = path = [config]
  for key in name.split('.'):
    holder = path[-1]
    if not isinstance(holder, ml_collections.ConfigDict) or key not in holder:
      leaves = [leaf for leaf, _ in _leaves(config)]
      raise ValueError(
          f'--config.{name}={text}: there is no such field'
          f'{_did_you_mean(name, leaves, prefix="config.")}')
    path.append(holder[key])
  if isinstance(path[-1], ml_collections.ConfigDict):
    raise ValueError(
        f'--config.{name}={text}: this is a section; set one of its fields, '
        f'{", ".join(f"config.{name}.{leaf}" for leaf, _ in _leaves(path[-1]))}'
        '.')
  kind = holder.get_type(key)
  try:
    if text.lower() == 'none' and path[-1] is None:
      value = None
    else:
      value = _parse(text, kind, path[-1])
  except (ValueError, SyntaxError, KeyError, TypeError) as error:
    raise ValueError(
        f'--config.{name}={text}: {_EXPECTED.get(kind, kind.__name__)} is '
        f'expected, as in the default {path[-1]!r}.') from error
  holder[key] = value


def _parse(text: str, kind: type, default: Any) -> Any:
  """Reads `text` as a value of type `kind`; any exception means it is not."""
  if kind is bool:
    return _BOOLEANS[text.lower()]
  if kind in (int, float, str):
    return kind(text)
  if kind is type(None):
    try:
      return ast.literal_eval(text)
    except (ValueError, SyntaxError):
      return text
  if kind not in (tuple, list):
    raise TypeError(kind)
  if not default or isinstance(default[0], str):
    try:
      value = ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a,b without quotes
      value = [item.strip() for item in text.strip('()[] ').split(',')]
  else:
    value = ast.literal_eval(text)
  value = value if isinstance(value, (tuple, list)) else (value,)
  if default:
    of = type(default[0])
    accepted = (int, float) if of is float else of
    if not all(
        isinstance(item, accepted) and isinstance(item, bool) == (of is bool)
        for item in value):
      raise TypeError(of)
    if of is float:
      value = map(float, value)
  return kind(value)


def _leaves(
    tree: Mapping[str, Any], prefix: str = ''
) -> Iterator[tuple[str, Any]]:
  """Yields (dotted name, value) of every leaf of nested mappings."""
  for key in tree:
    value = tree[key]
    if isinstance(value, (Mapping, ml_collections.ConfigDict)) and len(value):
      yield from _leaves(value, f'{prefix}{key}.')
    else:
      yield prefix + key, value


def _did_you_mean(name: Any, options: Sequence[Any], prefix: str = '') -> str:
  """The end of a sentence: the nearest option, if one is near at all."""
  name, options = str(name), [str(option) for option in options]

  def likeness(option):
    whole = difflib.SequenceMatcher(None, name, option).ratio()
    last = difflib.SequenceMatcher(
        None, name.split('.')[-1], option.split('.')[-1]).ratio()
    return max(whole, 0.99 * last), whole

  nearest = max(options, key=likeness, default=None)
  if nearest is None or likeness(nearest)[0] < 0.5:
    return '.'
  return f'; did you mean {prefix}{nearest}?'


def _exit(error: Exception) -> NoReturn:
  print('error:', ' '.join(str(error).split()), file=sys.stderr, flush=True)
  sys.exit(1)
