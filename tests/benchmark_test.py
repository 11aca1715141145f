"""Benchmark numbers against scripts written anew, and whole evaluations."""

import collections
import json
import pathlib
import re
import string

import jax
import numpy as np
import pytest

from configs import default
from stepsearch import benchmark
from stepsearch import engine
from stepsearch import evaluate
from stepsearch import methods
from stepsearch import paths
from stepsearch import protocol
from stepsearch import types
from stepsearch.data import datasets
from stepsearch.models import hf
from stepsearch.retrieval import retriever
from stepsearch.rollout import collect

SHARED = pathlib.Path(__file__).parents[2] / 'shared'

# ── Answers ──────────────────────────────────────────────────────────────────

CASES = [
    ('Paris', ['Paris']),
    ('the Paris.', ['paris']),
    ('Paris, France', ['Paris', 'City of Paris']),
    ('Paris, France', ['Lyon']),
    ('', ['Paris']),
    ('yes', ['yes']),
    ('yes', ['no']),
    ('yes it is', ['yes']),
    ('no', ['no man']),
    ('noanswer', ['no answer']),
    ('a b b c', ['b b b']),
    ('New York City', ['York', 'new york city!']),
    ('U.S.', ['US', 'United States']),
    ('1,000', ['1000']),
    ('The', ['The']),
    ('An apple a day', ['apple day']),
    ('state-of-the-art', ['state of art']),
]


def plain(text):
  """Normalisation by characters and a list of words."""
  kept = ''.join(c for c in text.lower() if c not in string.punctuation)
  kept = re.sub(r'\b(a|an|the)\b', ' ', kept)
  return kept.split()


def musique_f1(prediction, answer):
  """As MuSiQue's evaluation counts it, by removing words one at a time."""
  said, gold = plain(prediction), plain(answer)
  if not said or not gold:
    return float(said == gold)
  left, same = list(gold), 0
  for word in said:
    if word in left:
      left.remove(word)
      same += 1
  if same == 0:
    return 0.0
  precision, recall = same / len(said), same / len(gold)
  return 2 * precision * recall / (precision + recall)


def hotpotqa_f1(prediction, answer):
  """As HotpotQA's: yes, no and noanswer are right or wrong."""
  said, gold = ' '.join(plain(prediction)), ' '.join(plain(answer))
  for special in ('yes', 'no', 'noanswer'):
    if special in (said, gold) and said != gold:
      return 0.0
  same = sum((
      collections.Counter(said.split())
      & collections.Counter(gold.split())).values())
  if same == 0:
    return 0.0
  precision, recall = same / len(said.split()), same / len(gold.split())
  return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize('dataset, official', [
    ('musique', musique_f1), ('bamboogle', musique_f1),
    ('hotpotqa', hotpotqa_f1), ('2wiki', hotpotqa_f1),
    ('2WikiMultihopQA', hotpotqa_f1), ('', musique_f1)])
def test_f1_is_that_of_the_official_scripts(dataset, official):
  differ = 0
  for prediction, answers in CASES:
    expected = max(official(prediction, answer) for answer in answers)
    found = benchmark.f1(prediction, answers, dataset)
    assert found == pytest.approx(expected), (prediction, answers)
    other = {'musique': 'hotpotqa', 'hotpotqa': 'musique'}.get(
        benchmark.f1_rule(dataset))
    differ += found != benchmark.f1(prediction, answers, other)
  assert differ == 3
  assert benchmark.f1(None, ['Paris'], dataset) == 0.0


@pytest.mark.parametrize('prediction, answers, expected', [
    ('It is the city of Paris, France.', ['paris'], True),
    ('1,966', ['1966', 'x'], True), ('1966', ['66'], True),
    ('Paris', ['Paris, France'], False), ('any', ['the'], False),
    ('', ['Paris'], False), (None, ['Paris'], False)])
def test_cover_match(prediction, answers, expected):
  assert benchmark.cover_match(prediction, answers) is expected


# ── Means ────────────────────────────────────────────────────────────────────


def rows_of(values, hops=2):
  return [{
      'em': float(v), 'f1': v / 2, 'cover_em': 1.0, 'hops': hops,
      'gold_recall': None, 'searches': 2, 'redundancy_penalty': 0.5,
      'format_ok': True, 'prediction': 'x',
      'tokens': {'prompt': 10, 'sampled': 4, 'observed': 6}} for v in values]


def test_means_are_over_questions_and_by_hops():
  rows = rows_of([1, 1, 0], hops=2) + rows_of([0], hops=4)
  rows[0]['gold_recall'], rows[3]['gold_recall'] = 1.0, 0.5
  rows[1] |= {'prediction': None, 'format_ok': False}
  rows[3] |= {'searches': 0, 'redundancy_penalty': 0.0}
  found = benchmark.measure(rows, seed=0)
  expected = {
      'em': 0.5, 'f1': 0.25, 'cover_em': 1.0, 'em/2': 2 / 3, 'f1/2': 1 / 3,
      'em/4': 0.0, 'f1/4': 0.0, 'questions/2': 3, 'questions/4': 1,
      'gold_recall': 0.75, 'searches': 1.5, 'redundancy': 0.25, 'format': 0.75,
      'prompt_tokens': 10.0, 'sampled_tokens': 4.0, 'observed_tokens': 6.0,
      'unanswered': 0.25, 'questions': 4}
  for name, value in expected.items():
    assert found.pop(name) == pytest.approx(value), name
  assert set(found) == {'em_interval', 'f1_interval'}
  # Not the mean over hops that training watches.
  assert benchmark.measure(rows_of([1, 1], 0), 0)['gold_recall'] is None


def test_the_interval_of_a_mean():
  rng = np.random.default_rng(1)
  values = (rng.random(400) < 0.3).astype(float)
  low, high = benchmark.interval(values, seed=7)
  # The normal approximation, which at this size is as good.
  half = 1.96 * values.std() / np.sqrt(len(values))
  np.testing.assert_allclose(
      (low, high), (values.mean() - half, values.mean() + half), atol=0.006)
  noisy = rng.random(40)
  assert benchmark.interval(noisy, seed=7) == benchmark.interval(noisy, seed=7)
  assert benchmark.interval(noisy, seed=8) != benchmark.interval(noisy, seed=7)
  # One resample at a time, by counting.
  draws = np.random.default_rng(7)
  means = sorted(
      sum(values[i] for i in draws.integers(0, 400, 400)) / 400
      for _ in range(200))
  at = lambda q: means[int(np.floor(q * 199))]
  low, high = benchmark.interval(values, seed=7, resamples=200)
  assert at(0.025) <= low <= at(0.025) + 0.01
  assert at(0.975) <= high <= at(0.975) + 0.01
  assert benchmark.interval(np.ones(5), 0) == (1.0, 1.0)


def test_a_sample_is_seeded_and_in_order():
  examples = [types.Example(str(i), 'q', ('a',)) for i in range(50)]
  chosen = benchmark.sample(examples, 10, seed=3)
  numbers = [int(e.id) for e in chosen]
  assert numbers == sorted(set(numbers)) and len(numbers) == 10
  assert chosen == benchmark.sample(examples, 10, seed=3)
  assert chosen != benchmark.sample(examples, 10, seed=4)
  assert benchmark.sample(examples, 0, 0) == examples
  assert benchmark.sample(examples, 80, 0) == examples


def test_a_row_reads_the_answer_as_its_method_does():
  example = types.Example(
      'q', 'capital?', ('Paris',), (types.Document('1', 'T', 'x'),),
      hops=2, dataset='hotpotqa')
  rag = methods.make('rag').protocol
  found = benchmark.row(
      example, types.Transcript('prompt', (
          types.Turn('', 'capital?', (types.Document('1', 'T', 'x'),)),
          types.Turn(' Paris.<eos>'))),
      collect.Tokens(5, 3, 0), rag, ['<eos>'], k=2)
  assert (found['prediction'], found['em'], found['f1']) == ('Paris.', 1., 1.)
  assert (found['searches'], found['gold_recall']) == (1, 1.0)
  assert found['format_ok'] and found['tokens']['prompt'] == 5
  found = benchmark.row(
      example, types.Transcript('prompt', (
          types.Turn(protocol.search_turn('t', 'q'), 'q'),
          types.Turn('Paris<eos>'))),
      collect.Tokens(5, 3, 0), protocol.Protocol(), ['<eos>'], k=2)
  assert found['prediction'] is None and not found['format_ok']
  assert (found['em'], found['cover_em']) == (0.0, 0.0)
  json.dumps(found)


def test_a_record_goes_on_whatever_byte_it_was_cut_at(tmp_path):
  settings = {'method': 'agent', 'datasets': {'a': {}}}
  rows = [
      {'dataset': 'a', 'em': 1.0, 'text': 'é\u2028東\x85\x1c\r'},
      {'dataset': 'a', 'em': 0.0, 'text': '京'}]
  record = benchmark.Record(tmp_path, settings)
  for number, row in enumerate(rows):
    record.add(number, row)
  file = tmp_path / 'transcripts.jsonl'
  whole = file.read_bytes()
  for end in range(len(whole) + 1):
    file.write_bytes(whole[:end])
    record = benchmark.Record(tmp_path, settings)
    count = whole[:end].count(b'\n')
    assert record.done('a') == set(range(count)), end
    for number, row in list(enumerate(rows))[count:]:
      record.add(number, row)
    assert file.read_bytes() == whole


# ── Whole evaluations ────────────────────────────────────────────────────────


@pytest.fixture
def evaluation(tmp_path, monkeypatch, scripted, model, chatty, tokenizer):
  """(output, questions a set, **options) -> results.

  Two sets of seven questions, each with its corpus; where it is greedy, of a
  policy that searches once and always answers the same, else of a random one.
  """
  devices = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *_: devices)
  chain = ['\n', '<search>', ' alba', '</search>', '</information>', '<answer>',
           ' bero', '</answer>']
  ids = [tokenizer.encode(text)[0] for text in chain]
  chained = scripted.chain_policy(dict(zip(ids, ids[1:])))
  hf.save(tmp_path / 'greedy', *chained, tokenizer)
  hf.save(tmp_path / 'sampled', model, chatty, tokenizer)
  words = ('alba', 'bero', 'cuna', 'dilo', 'efra', 'gomi')
  for name in ('first', 'second'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'corpus.jsonl').write_text(''.join(
        json.dumps({'id': i, 'title': '', 'text': f'{w} of the mayor'})
        + '\n' for i, w in enumerate(words)))
    (tmp_path / name / 'questions.jsonl').write_text(''.join(
        json.dumps({
            'id': f'{name}{i}', 'question': f'who is {words[i % 6]} ?',
            'answers': [words[i % 5]], 'gold': [i % 6]}) + '\n'
        for i in range(7)))
  config = default.get_config()
  config.model.dtype = 'float32'
  config.retriever.dimensions = 64
  config.eval.batch_size = 4
  config.rollout.update(dict(
      protocol='short', max_turns=3, k=2, prompt_length=8, response_length=10,
      observation_length=12, max_length=80, length_multiple=8, lag=0))

  def run(output, questions=0, **options):
    kind = 'sampled' if options.get('sampled') else 'greedy'
    return evaluate.run_benchmarks(
        config, str(tmp_path / kind),
        output if '://' in output else str(tmp_path / output),
        [str(tmp_path / name / 'questions.jsonl')
         for name in ('first', 'second')],
        **dict(corpus=str(tmp_path / '{dataset}/corpus.jsonl')) | options,
        questions=questions)

  run.config = config
  return run


def test_an_evaluation_interrupted_anywhere_ends_as_it_would_have(
    evaluation, tmp_path, monkeypatch, capfd):
  whole = evaluation('whole')['agent']
  rows = (tmp_path / 'whole/transcripts.jsonl').read_text()
  stored = json.loads((tmp_path / 'whole/eval.json').read_text())
  assert list(whole) == ['first', 'second']
  assert stored['results'] == json.loads(json.dumps(whole))
  assert stored['datasets']['first']['passages'] == 6
  assert stored['chat'] == 'off'  # what `auto` has come to
  assert stored['datasets']['first']['drawn_with_seed'] is None
  parsed = [json.loads(line) for line in rows.splitlines()]
  assert [(r['dataset'], r['number']) for r in parsed] == [
      (name, n) for name in ('first', 'second') for n in range(7)]
  found = whole['first']
  assert found['em'] == np.mean([r['em'] for r in parsed[:7]]) == 2 / 7
  assert found['gold_recall'] == np.mean([r['gold_recall'] for r in parsed[:7]])
  assert (found['searches'], found['redundancy'], found['format']) == (1, 0, 0)
  assert found['sampled_tokens'] == 6
  said = capfd.readouterr()
  assert 'first agent 7/7 | em' in said.out and not said.err

  played, until = [], [3, 9]
  add = benchmark.Record.add

  def add_until(self, number, row):
    if len(played) in until[:1]:
      raise KeyboardInterrupt
    played.append((row['dataset'], number))
    add(self, number, row)

  monkeypatch.setattr(benchmark.Record, 'add', add_until)
  for _ in range(2):
    with pytest.raises(KeyboardInterrupt):
      evaluation('cut')
    assert json.loads(
        (tmp_path / 'cut/eval.json').read_text())['results'] is None
    assert len(played) == until.pop(0)
  with (tmp_path / 'cut/transcripts.jsonl').open('a') as file:
    file.write('{"torn')
  assert evaluation('cut')['agent'] == whole
  assert sorted(played) == [
      (name, n) for name in ('first', 'second') for n in range(7)]
  assert (tmp_path / 'cut/transcripts.jsonl').read_text() == rows
  # A finished one is told again, and not played.
  assert evaluation('cut')['agent'] == whole and len(played) == 14
  evaluation.config.rollout.max_turns = 2
  with pytest.raises(ValueError, match='another evaluation: its budgets is'):
    evaluation('cut')


def test_an_evaluation_in_a_store_goes_on_from_its_last_batch(
    evaluation, tmp_path, monkeypatch, bucket):
  whole = evaluation('whole', 5)['agent']
  add = benchmark.Record.add

  def add_until(self, number, row):
    if number == 4 and row['dataset'] == 'second':
      raise KeyboardInterrupt
    add(self, number, row)

  out = f'{bucket}/out'
  with monkeypatch.context() as patch:
    patch.setattr(benchmark.Record, 'add', add_until)
    with pytest.raises(KeyboardInterrupt):
      evaluation(out, 5)
  kept = (paths.Path(out) / 'transcripts.jsonl').read_text().splitlines()
  assert len(kept) == 9
  assert evaluation(out, 5)['agent'] == whole
  assert (paths.Path(out) / 'transcripts.jsonl').read_text() == (
      tmp_path / 'whole/transcripts.jsonl').read_text()


class _Known:
  """Stands for a server: finds what it was told, and says it has failed."""

  def __init__(self, gold):
    self.gold, self.failed = gold, 0

  def search(self, queries, k):
    self.failed += len(queries)
    return [self.gold[:k] for _ in queries]


def test_a_server_is_told_the_gold_documents_of_all_sets(
    evaluation, monkeypatch, tmp_path):
  told = []

  def build(config, corpus, workdir, say, gold):
    told.append(list(gold))
    return _Known(gold)

  def add_until(self, number, row):
    if number == 3:
      raise KeyboardInterrupt
    add(self, number, row)

  add = benchmark.Record.add
  monkeypatch.setattr(engine, 'build', build)
  evaluation.config.retriever.url = 'http://127.0.0.1:9'
  corpus = str(tmp_path / 'first/corpus.jsonl')
  with monkeypatch.context() as patch:
    patch.setattr(benchmark.Record, 'add', add_until)
    with pytest.raises(KeyboardInterrupt):
      evaluation('out', corpus=corpus)
  evaluation('out', corpus=corpus)
  assert [len(gold) for gold in told] == [14, 14]
  # Four before the interruption, then as many batches of four as are missing.
  assert 'failed_searches": 16' in (tmp_path / 'out/eval.json').read_text()
  stored = json.loads((tmp_path / 'out/eval.json').read_text())
  assert [s['corpus_fingerprint'] for s in stored['datasets'].values()] == [
      retriever.corpus_fingerprint(datasets.read_corpus(
          tmp_path / 'first/corpus.jsonl'))] * 2


def test_another_set_compiles_nothing(evaluation, monkeypatch):
  compiled, at = [], {}
  add = benchmark.Record.add

  def note(event, _, **__):
    compiled.append('backend_compile' in event)

  def counted(self, number, row):
    at[row['dataset'], number] = sum(compiled)
    add(self, number, row)

  monkeypatch.setattr(benchmark.Record, 'add', counted)
  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    evaluation('out', 6)
  finally:
    jax.monitoring.unregister_event_duration_listener(note)
  assert len(at) == 12
  assert len({n for (name, _), n in at.items() if name == 'second'}) == 1


def test_a_sampled_evaluation_goes_on_from_its_last_whole_batch(
    evaluation, tmp_path, monkeypatch):
  whole = evaluation('whole', 5, sampled=True)
  add = benchmark.Record.add

  def add_until(self, number, row):
    if number == 4 and row['dataset'] == 'first':
      raise KeyboardInterrupt
    add(self, number, row)

  with monkeypatch.context() as patch:
    patch.setattr(benchmark.Record, 'add', add_until)
    with pytest.raises(KeyboardInterrupt):
      evaluation('cut', 5, sampled=True)
  assert evaluation('cut', 5, sampled=True) == whole
  stored = json.loads((tmp_path / 'cut/eval.json').read_text())
  assert stored['decoding'] == {
      'kind': 'sampled', 'seed': 0, 'temperature': 1.0, 'top_p': 1.0,
      'top_k': 0}
  assert stored['datasets']['first']['asked'] == 5
  assert stored['datasets']['first']['drawn_with_seed'] == 0


def test_evaluations_that_cannot_be_are_refused(evaluation, tmp_path):
  def refused(match, **options):
    with pytest.raises(ValueError, match=match):
      evaluation('out', **options)

  refused('there is no such method', methods=['directt'])
  refused('only --method=agent can do with the short', methods=['direct'])
  (tmp_path / 'prompt').write_text('nothing')
  refused('short knows no other prompt', prompt=str(tmp_path / 'prompt'))
  evaluation.config.rollout.protocol = 'full'
  refused('each only once', methods=['agent', 'agent'])
  refused('no such method', methods=[])
  refused('are of one method', methods=['rag', 'direct'], prompt='x')
  refused('cannot be read', methods=['rag'], system='/no/such')
  refused('the method direct needs {question}', methods=['direct'],
          prompt=str(tmp_path / 'prompt'))
  with pytest.raises(ValueError, match='=musiqe: .* sets are musique, '):
    evaluate._sets(evaluation.config, ['musiqe'], 'x', 0, tmp_path, print)
