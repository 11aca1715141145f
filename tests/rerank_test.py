"""Cross-encoders against torch, and engines that one orders anew."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tokenizers

from configs import default
from stepsearch import distributed
from stepsearch import engine as engine_lib
from stepsearch import sharding
from stepsearch.models import encoder
from stepsearch.retrieval import bm25
from stepsearch.retrieval import encoders
from stepsearch.retrieval import engines
from stepsearch.retrieval import fusion
from stepsearch.retrieval import rerank
from stepsearch.retrieval import retriever
from stepsearch.retrieval import shards
from stepsearch.types import Document

_WORDS = ('alba', 'bero', 'cuna', 'dilo', 'efra', 'gomi', 'is', 'in', 'the')
_TINY = dict(
    vocab_size=20, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
    intermediate_size=48, max_position_embeddings=40, type_vocab_size=2)
# The shape of MiniLM-L6 and the ms-marco cross-encoders, but for the words.
_MINILM = dict(
    vocab_size=20, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
    intermediate_size=1536, max_position_embeddings=512, type_vocab_size=2)
_DOCUMENTS = [
    Document(str(i), 'alba', text) for i, text in enumerate((
        'bero cuna', 'dilo efra gomi', 'is in the', 'bero bero bero', 'gomi'))]


def _need_torch():
  reason = 'torch (tests/requirements-parity.txt) is not installed'
  return (pytest.importorskip('torch', reason=reason),
          pytest.importorskip('transformers', reason=reason))


def _write_tokenizer(folder):
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', *_WORDS]
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(
      {word: i for i, word in enumerate(words)}, unk_token='[UNK]'))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
      single='[CLS] $A [SEP]', pair='[CLS] $A [SEP] $B:1 [SEP]:1',
      special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
  tokenizer.save(str(folder / 'tokenizer.json'))


def _torch_model(folder, sizes, labels=1, scale=0.25):
  """Random weights that all matter, saved as transformers saves them."""
  torch, transformers = _need_torch()
  model = transformers.BertForSequenceClassification(
      transformers.BertConfig(**sizes, num_labels=labels)).eval()
  rng = np.random.default_rng(0)
  with torch.no_grad():
    for name, value in model.named_parameters():
      mean = float('norm' in name.lower() and name.endswith('weight'))
      value.copy_(torch.tensor(
          rng.normal(mean, scale, tuple(value.shape)).astype(np.float32)))
  folder.mkdir(parents=True, exist_ok=True)
  model.save_pretrained(folder)
  _write_tokenizer(folder)
  return model


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
  folder = tmp_path_factory.mktemp('models') / 'tiny'
  return folder, _torch_model(folder, _TINY)


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh(devices=jax.devices()[:1])


def _pairs(count, longest, seed=0):
  rng = np.random.default_rng(seed)
  text = lambda: ' '.join(rng.choice(_WORDS, rng.integers(1, longest)))
  return [(text(), text()) for _ in range(count)]


def _torch_scores(model, folder, pairs, length):
  """One pair at a time, without padding."""
  import torch

  tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  tokenizer.enable_truncation(length)
  scores = []
  for pair in pairs:
    row = tokenizer.encode(*pair)
    with torch.no_grad():
      scores.append(model(
          torch.tensor([row.ids]), token_type_ids=torch.tensor([row.type_ids])
      ).logits.item())
  return np.array(scores)


def test_scores_are_those_of_torch(tiny, mesh):
  folder, model = tiny
  pairs = _pairs(20, 30)  # some are longer than 40 tokens
  found = rerank.load(folder, mesh=mesh).score(pairs)
  expected = _torch_scores(model, folder, pairs, 40)
  assert found.dtype == np.float32 and np.ptp(expected) > 0.1
  np.testing.assert_allclose(found, expected, atol=2e-5)
  # Which text is the passage matters.
  turned = rerank.load(folder, mesh=mesh).score([(b, a) for a, b in pairs])
  assert np.abs(turned - found).max() > 1e-2


def test_scores_of_minilms_shape_are_those_of_torch(tmp_path, mesh):
  model = _torch_model(tmp_path / 'minilm', _MINILM, scale=0.05)
  pairs = _pairs(3, 60)
  found = rerank.load(tmp_path / 'minilm', mesh=mesh).score(pairs)
  expected = _torch_scores(model, tmp_path / 'minilm', pairs, 512)
  np.testing.assert_allclose(found, expected, atol=2e-5)


def test_scores_do_not_depend_on_batch_or_devices(tiny, mesh, monkeypatch):
  folder, _ = tiny
  pairs = _pairs(6, 12)
  one = rerank.load(folder, mesh=mesh)
  found = one.score(pairs)
  alone = np.concatenate([one.score([pair]) for pair in pairs])
  np.testing.assert_allclose(alone, found, atol=1e-5)
  monkeypatch.setitem(encoders._TOKENS, 'cpu', 64)
  small = rerank.load(folder, mesh=sharding.make_mesh()).score(pairs)
  np.testing.assert_allclose(small, found, atol=1e-5)
  assert one.score([]).shape == (0,)


def test_candidates_are_ordered_by_the_scorer(tiny, mesh):
  folder, _ = tiny
  scorer = rerank.load(folder, mesh=mesh)
  inner = retriever.build(_DOCUMENTS, dimensions=64)
  asked = []
  search = inner.search
  inner.search = lambda queries, k: asked.append(k) or search(queries, k)
  engine = rerank.Reranked(inner, scorer, candidates=4)
  queries = ['bero gomi', '', 'alba']
  found = engine.search(queries, 2)
  assert asked == [4] and found[1] == [] and len(engine) == 5
  for query, row in zip(queries, found):
    candidates = search([query], 4)[0]
    scores = dict(zip(
        [d.id for d in candidates], scorer.score(
            [(query, f'{d.title}\n{d.text}') for d in candidates]).tolist()))
    best = sorted(scores, key=scores.get, reverse=True)[:2]
    assert [d.id for d in row] == best
    assert [d.score for d in row] == pytest.approx(
        [scores[name] for name in best], abs=1e-5)
  engine.search(queries, 5)
  assert asked[-1] == 5  # k beyond the candidates
  np.testing.assert_array_equal(
      engine.embed(['alba']), inner.embed(['alba']))
  assert scorer.fingerprint in engine.fingerprints['embedder']
  with pytest.raises(ValueError, match='k = 6'):
    engine.search(queries, 6)


def test_a_text_names_a_reranked_engine(tiny):
  folder, _ = tiny
  engine = engines.make(f'rerank:{folder}:bm25', _DOCUMENTS)
  assert {d.id for d in engine.search(['bero'], 2)[0]} <= {
      d.id for d in bm25.build(_DOCUMENTS).search(['bero'], 5)[0]}
  with pytest.raises(ValueError, match='no usable cross-encoder'):
    engines.make(f'rerank:{folder.parent}:bm25', _DOCUMENTS)


def test_folders_that_are_refused(tiny, tmp_path, mesh):
  folder, _ = tiny
  copy = pathlib.Path(shutil.copytree(folder, tmp_path / 'copy'))
  raw = json.loads((copy / 'config.json').read_text())
  (copy / 'config.json').write_text(
      json.dumps(raw | dict(model_type='xlm-roberta')))
  with pytest.raises(ValueError, match='xlm-roberta.*bge-reranker'):
    rerank.load(copy, mesh=mesh)
  _torch_model(tmp_path / 'two', _TINY, labels=2)
  with pytest.raises(ValueError, match='classifier.weight has 2 labels'):
    rerank.load(tmp_path / 'two', mesh=mesh)
  _, transformers = _need_torch()
  transformers.BertModel(transformers.BertConfig(**_TINY)).save_pretrained(
      tmp_path / 'bare')
  _write_tokenizer(tmp_path / 'bare')
  with pytest.raises(ValueError, match='there is no classifier.weight'):
    rerank.load(tmp_path / 'bare', mesh=mesh)


def test_a_folder_of_sentence_transformers_loads(tiny, tmp_path, mesh):
  folder, _ = tiny
  copy = pathlib.Path(shutil.copytree(folder, tmp_path / 'copy'))
  raw = json.loads((copy / 'config.json').read_text())
  raw['sentence_transformers'] = {'activation_fn': 'torch.nn.Identity'}
  (copy / 'config.json').write_text(json.dumps(raw))
  loaded = rerank.load(copy, mesh=mesh)
  assert isinstance(loaded._module, encoder.CrossEncoder)


@pytest.mark.parametrize('placement', ['replicated', 'sharded'])
def test_the_config_names_a_reranker(tiny, tmp_path, monkeypatch, placement):
  folder, _ = tiny
  config = default.get_config()
  config.retriever.update(dict(
      method='fusion', dimensions=64, index='exact', reranker=str(folder),
      rerank_candidates=4, placement=placement))
  made = engine_lib.build(config, _DOCUMENTS, tmp_path, lambda _: None)
  parts = bm25.build(_DOCUMENTS), retriever.build(_DOCUMENTS, dimensions=64)
  expected = rerank.Reranked(
      fusion.Fusion(parts), rerank.load(folder), 4).search(['bero gomi'], 2)
  assert made.search(['bero gomi'], 2) == expected
  # Of two processes the second scores every other pair of a sharded engine.
  asked = []
  monkeypatch.setattr(distributed, 'count', lambda: 2)
  monkeypatch.setattr(distributed, 'index', lambda: 1)
  monkeypatch.setattr(distributed, 'barrier', lambda *_: None)
  monkeypatch.setattr(shards, 'distribute', lambda engine, *_: made._engine)
  monkeypatch.setattr(
      rerank.Scorer, 'score',
      lambda self, pairs: asked.append(pairs) or np.ones(len(pairs)))
  monkeypatch.setattr(
      distributed, 'exchange', lambda value, channel: [value, value])
  if placement == 'sharded':
    engine = engine_lib.build(config, _DOCUMENTS, tmp_path, lambda _: None)
    assert isinstance(engine, rerank.Reranked)
    engine.search(['bero gomi'], 2)
    assert len(asked[0]) == 2  # of four candidates
