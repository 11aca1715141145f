import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch.models import cache as cache_lib
from stepsearch.models import qwen

BASE = qwen.Config(
    vocab_size=50, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=48,
    rope_theta=1e4)
CONFIGS = {
    'qwen2': BASE,
    'qwen2-untied': dataclasses.replace(
        BASE, tie_embeddings=False, rope_theta=1e6, rms_norm_eps=1e-5),
    'qwen3': dataclasses.replace(
        BASE, attention_bias=False, qk_norm=True, head_dim=16),
    'qwen3-untied': dataclasses.replace(
        BASE, attention_bias=False, qk_norm=True, tie_embeddings=False,
        heads=4, kv_heads=4),
}


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, tokens):
  positions = jnp.broadcast_to(
      jnp.arange(tokens.shape[1])[None], tokens.shape)
  hidden, new = qwen.Qwen(config).apply({'params': params}, tokens, positions)
  return hidden @ qwen.unembedding(params), hidden, new


def loop(config, params, tokens):
  """Logits [T, V] of one row in float64, head by head and token by token."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

  def norm(x, scale):
    return x / np.sqrt((x**2).mean() + config.rms_norm_eps) * scale

  def rotate(x, position):
    half = config.head_dim // 2
    out = np.empty_like(x)
    for i in range(half):
      angle = position * config.rope_theta**(-i / half)
      pair = complex(x[i], x[i + half]) * np.exp(1j * angle)
      out[i], out[i + half] = pair.real, pair.imag
    return out

  x = p['embedding'][np.asarray(tokens)]
  for layer in range(config.layers):
    w = jax.tree.map(lambda leaf, n=layer: leaf[n], p['layers'])
    a, m = w['attention'], w['mlp']
    q, k, v = {}, {}, {}
    for t, row in enumerate(x):
      h = norm(row, w['attention_norm']['scale'])
      for name, out, heads in (
          ('q', q, config.heads), ('k', k, config.kv_heads),
          ('v', v, config.kv_heads)):
        for n in range(heads):
          y = h @ a[name][:, n]
          if config.attention_bias:
            y = y + a[f'{name}_bias'][n]
          if config.qk_norm and name != 'v':
            y = norm(y, a[f'{name}_norm']['scale'])
          out[t, n] = y if name == 'v' else rotate(y, t)
    for t in range(len(x)):
      y = np.zeros(config.embed)
      for n in range(config.heads):
        g = n // (config.heads // config.kv_heads)
        scores = np.asarray([
            q[t, n] @ k[s, g] for s in range(t + 1)]) / config.head_dim**0.5
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        y += sum(weights[s] * v[s, g] for s in range(t + 1)) @ a['o'][n]
      x[t] = x[t] + y
    for t in range(len(x)):
      h = norm(x[t], w['mlp_norm']['scale'])
      gate = h @ m['gate']
      x[t] = x[t] + gate / (1 + np.exp(-gate)) * (h @ m['up']) @ m['down']
  matrix = p['embedding'].T if config.tie_embeddings else p['lm_head']
  return np.stack([norm(row, p['final_norm']['scale']) for row in x]) @ matrix


@pytest.mark.parametrize('name', CONFIGS)
def test_logits_are_those_of_a_loop(name, random_params):
  config = CONFIGS[name]
  params = random_params(config)
  tokens = np.random.default_rng(1).integers(0, 50, (2, 9))
  found, _, _ = logits(config, params, jnp.asarray(tokens))
  for row in range(2):
    np.testing.assert_allclose(
        found[row], loop(config, params, tokens[row]), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize('name', CONFIGS)
def test_logits_are_those_of_hugging_face(name, random_params):
  torch = pytest.importorskip(
      'torch', reason='torch (tests/requirements-parity.txt) is not installed')
  import transformers

  c = CONFIGS[name]
  kind = 'Qwen3' if c.qk_norm else 'Qwen2'
  options = dict(
      vocab_size=c.vocab_size, hidden_size=c.embed, num_hidden_layers=c.layers,
      num_attention_heads=c.heads, num_key_value_heads=c.kv_heads,
      intermediate_size=c.mlp, rms_norm_eps=c.rms_norm_eps,
      rope_parameters={'rope_type': 'default', 'rope_theta': c.rope_theta},
      tie_word_embeddings=c.tie_embeddings, max_position_embeddings=128,
      attention_dropout=0.0)
  if c.qk_norm:
    options |= dict(head_dim=c.head_dim, attention_bias=c.attention_bias)
  theirs = getattr(transformers, f'{kind}ForCausalLM')(
      getattr(transformers, f'{kind}Config')(**options)).eval()
  params = jax.tree.map(np.asarray, random_params(c))

  state = {
      'model.embed_tokens.weight': params['embedding'],
      'model.norm.weight': params['final_norm']['scale'],
      'lm_head.weight': (
          params['embedding'] if c.tie_embeddings else params['lm_head'].T),
  }
  for i in range(c.layers):
    w = jax.tree.map(lambda leaf, n=i: leaf[n], params['layers'])
    a, at = w['attention'], f'model.layers.{i}'
    state[f'{at}.input_layernorm.weight'] = w['attention_norm']['scale']
    state[f'{at}.post_attention_layernorm.weight'] = w['mlp_norm']['scale']
    for n in 'qkv':
      state[f'{at}.self_attn.{n}_proj.weight'] = a[n].reshape(c.embed, -1).T
      if c.attention_bias:
        state[f'{at}.self_attn.{n}_proj.bias'] = a[f'{n}_bias'].reshape(-1)
    state[f'{at}.self_attn.o_proj.weight'] = a['o'].reshape(-1, c.embed).T
    if c.qk_norm:
      for n in 'qk':
        state[f'{at}.self_attn.{n}_norm.weight'] = a[f'{n}_norm']['scale']
    for n in ('gate', 'up', 'down'):
      state[f'{at}.mlp.{n}_proj.weight'] = w['mlp'][n].T
  assert state.keys() == theirs.state_dict().keys()
  theirs.load_state_dict(
      {n: torch.tensor(np.ascontiguousarray(x)) for n, x in state.items()})

  # Rows of 13, 7 and 1 tokens, padded behind.
  tokens = np.random.default_rng(2).integers(0, 50, (3, 13))
  lengths = (13, 7, 1)
  mask = np.arange(13)[None] < np.asarray(lengths)[:, None]
  with torch.no_grad():
    expected = theirs(
        torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()
  found, _, _ = logits(c, params, jnp.asarray(tokens))
  np.testing.assert_allclose(
      np.asarray(found)[mask], expected[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['qwen2', 'qwen3'])
def test_cached_append_is_the_full_forward(name, random_params):
  config = CONFIGS[name]
  params = random_params(config)
  rng = np.random.default_rng(3)
  tokens = jnp.asarray(rng.integers(0, 50, (3, 20)))
  _, full, _ = logits(config, params, tokens)
  apply = jax.jit(
      lambda *x: qwen.Qwen(config).apply({'params': params}, *x))

  # Prompts of 5, 2 and 7 tokens, then 6, one and one more.
  length = jnp.asarray([5, 2, 7])
  _, hidden, new = logits(config, params, tokens[:, :7])
  write = jax.jit(cache_lib.write)
  cache = write(
      qwen.empty_cache(config, 3, 32), new, jnp.zeros(3, jnp.int32))
  for row in range(3):
    np.testing.assert_allclose(
        hidden[row, :length[row]], full[row, :length[row]], atol=1e-5)
  for width in (6, 1, 1):
    positions = length[:, None] + jnp.arange(width)[None]
    chunk = jnp.take_along_axis(tokens, positions, axis=1)
    hidden, new = apply(chunk, positions, cache, length)
    expected = jnp.take_along_axis(full, positions[..., None], axis=1)
    np.testing.assert_allclose(hidden, expected, rtol=1e-4, atol=1e-4)
    cache = write(cache, new, length)
    length += width


def test_write_puts_each_row_at_its_own_position():
  rng = np.random.default_rng(4)
  shape = lambda size: (BASE.layers, 3, BASE.kv_heads, size, BASE.head_dim)
  old, new = (
      qwen.Cache(*rng.normal(size=(2, *shape(n))).astype(np.float32))
      for n in (12, 4))
  position = [0, 8, 3]
  found = cache_lib.write(
      jax.tree.map(jnp.asarray, old), jax.tree.map(jnp.asarray, new),
      jnp.asarray(position))
  for name in 'kv':
    expected = getattr(old, name).copy()
    for row, at in enumerate(position):
      expected[:, row, :, at:at + 4] = getattr(new, name)[:, row]
    np.testing.assert_array_equal(getattr(found, name), expected)


def test_what_follows_is_not_seen(
    random_params):
  params = random_params(BASE)
  tokens = np.random.default_rng(5).integers(0, 50, (2, 9))
  other = tokens.copy()
  other[:, 5:] = (other[:, 5:] + 1) % 50
  _, first, _ = logits(BASE, params, jnp.asarray(tokens))
  _, second, _ = logits(BASE, params, jnp.asarray(other))
  np.testing.assert_array_equal(first[:, :5], second[:, :5])
  assert (first[:, 5:] != second[:, 5:]).any(axis=-1).all()


def test_remat_and_bfloat16(
    random_params):
  params = random_params(BASE)
  tokens = jnp.asarray(np.random.default_rng(6).integers(0, 50, (2, 9)))
  loss = lambda params, config: jnp.sum(logits(config, params, tokens)[0]**2)
  grad = jax.jit(jax.grad(loss), static_argnums=1)
  plain = grad(params, BASE)
  for remat in qwen.REMAT:
    again = grad(params, dataclasses.replace(BASE, remat=remat))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-3),
        plain, again)
  half = dataclasses.replace(BASE, dtype='bfloat16')
  found, hidden, new = logits(half, params, tokens)
  assert hidden.dtype == new.k.dtype == jnp.bfloat16
  exact, _, _ = logits(BASE, params, tokens)
  error = np.abs(np.asarray(found, np.float32) - exact).mean()
  assert error < 0.05 * np.abs(exact).mean()


def test_critic_starts_at_zero_and_reads_the_actor_s_trunk(
    random_params):
  config = CONFIGS['qwen2-untied']
  actor = random_params(config)
  critic = qwen.init_critic(config, actor)
  tokens = jnp.asarray(np.random.default_rng(7).integers(0, 50, (2, 6)))
  positions = jnp.broadcast_to(jnp.arange(6)[None], (2, 6))
  values = jax.jit(
      lambda p: qwen.Critic(config).apply({'params': p}, tokens, positions))
  assert (values(critic) == 0).all() and values(critic).dtype == jnp.float32
  head = jnp.arange(32.0)
  _, hidden, _ = logits(config, actor, tokens)
  np.testing.assert_allclose(
      values(critic | {'head': head}), hidden @ head, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_dimension_has_its_logical_axis(name):
  config = CONFIGS[name]
  actor = jax.eval_shape(lambda: qwen.init(config, jax.random.key(0)))
  critic = jax.eval_shape(
      lambda: qwen.init_critic(config, qwen.init(config, jax.random.key(0))))
  sizes = {
      'layers': 2, 'vocab': 50, 'embed': 32, 'norm': 32, 'heads': config.heads,
      'kv_heads': config.kv_heads, 'head_dim': config.head_dim, 'mlp': 48}
  for params, axes in zip((actor, critic), qwen.axes(config)):
    # Same structure, and every name is that of a dimension of its size.
    checked = jax.tree.map(
        lambda x, names: x.shape == tuple(sizes[n] for n in names), params,
        axes)
    assert all(jax.tree.leaves(checked)), checked


@pytest.mark.parametrize(
    ('field', 'value'),
    [('kv_heads', 3), ('head_dim', 7), ('layers', 0), ('vocab_size', -1)])
def test_impossible_sizes_are_refused(field, value):
  with pytest.raises(ValueError, match=rf'config\.model\.\w+ = {value}\b|= 3'):
    dataclasses.replace(BASE, **{field: value})
