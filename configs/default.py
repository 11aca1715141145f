"""Every leaf, with the paper's numbers; other files change what they need."""

from ml_collections import ConfigDict
from ml_collections import config_dict


def get_config(arg=''):
  del arg
  config = ConfigDict()
  config.seed = 0
  config.algorithm = 'steppo'  # steppo | ppo: the reward of the answer alone
  config.num_steps = 500
  config.batch_size = 256  # episodes a step
  config.rollouts_per_question = 1
  config.topology = ''  # TPU slice that the rest is made for, in chips: v5e:4x4
  config.mesh = (-1, 1, 1)  # data, fsdp, tensor; -1: what is left
  # The axes of the mesh that split each kind of dimension: of weights,
  # optimizer and batches in the update, of weights and cache in decoding.
  config.sharding = ConfigDict(dict(
      update=dict(
          batch=('data', 'fsdp'), embed=('fsdp',), vocab=('tensor',),
          heads=('tensor',), kv_heads=('tensor',), mlp=('tensor',)),
      decode=dict(
          batch=('data', 'fsdp'), embed=(), vocab=('tensor',),
          heads=('tensor',), kv_heads=('tensor',), mlp=('tensor',))))
  # What lies in host memory while it is not needed: optimizer, reference.
  config.offload = ()
  config.tokenizer = ''  # folder or tokenizer.json; '' = the world's own words
  config.tensorboard = True
  config.compilation_cache = ''  # folder for compiled programs; '' = off

  config.model = ConfigDict(dict(
      # Hugging Face folder, local or gs://, whose config, tokenizer and weights
      # the run starts from; '' = random weights of the sizes below.
      pretrained='',
      # The shape of Qwen2.5-3B; vocab_size 0 = the tokenizer's. With a folder
      # its config.json counts, and nothing in these lines.
      vocab_size=0, embed=2048, layers=36, heads=16, kv_heads=2, head_dim=128,
      mlp=11008, rope_theta=1e6, rms_norm_eps=1e-6, tie_embeddings=True,
      attention_bias=True, qk_norm=False,
      # These three hold for every model.
      dtype='bfloat16',
      remat='full',  # off | dots | attention | full: recomputed for gradients
      attention='auto'))  # auto | plain | splash (TPU) | cudnn (GPU)

  # Trains small matrices beside frozen weights, merged where they are not
  # trained: weights W + alpha / rank A B, A B of so many columns and rows.
  config.lora = ConfigDict(dict(
      rank=0,  # 0 = off: all weights are trained
      alpha=16.0,
      targets=('q', 'k', 'v', 'o', 'gate', 'up', 'down')))

  config.data = ConfigDict(dict(
      source='jsonl',  # jsonl | world
      # Of source = jsonl: files, or what `python -m stepsearch.prepare` made in
      # `directory`: NAME:SPLIT such as musique:train, and musique:corpus.
      train='', corpus='', directory='',
      eval='',  # one or more, joined by commas
      demonstrations='',  # JSONL of {question, text}; or search_keys
      train_questions=4000,  # source = world: how many are made
      eval_questions=0,  # the first of each file; 0 = all
      train_hops=(2, 3, 4), train_shares=(1., 1., 1.),
      eval_hops=(2, 3, 4), eval_shares=(1., 1., 1.)))
  config.world = ConfigDict(dict(
      train_entities=240, eval_entities=120, name_words=40, same_type=False))

  config.retriever = ConfigDict(dict(
      method='dense',  # dense | bm25 | fusion: of both, by reciprocal ranks
      embedder='lexical',  # or the folder of an encoder: E5, BGE, MiniLM, ...
      dimensions=2048,  # of lexical
      # Put before the encoder's texts; None = as it was trained.
      query_prefix=config_dict.placeholder(str),
      passage_prefix=config_dict.placeholder(str),
      index='auto',  # auto | scann | exact
      directory='',  # '' = <workdir>/index; BM25's of fusion in <it>-bm25
      fusion_constant=60.0, fusion_depth=100,  # documents asked of each
      # Folder of a cross-encoder that orders so many candidates anew; '' = off.
      reranker='', rerank_candidates=50,
      # Of several processes each holds the index, or a shard of it: replicated
      # | sharded.
      placement='replicated',
      # A server of Search-R1's protocol, such as `python -m stepsearch.serve`;
      # several that serve the same (replicas), joined by commas.
      url='',
      web='',  # a web search API instead of a corpus: serper | bing
      web_url='',  # another address that speaks like it
      web_key='',  # environment variable with the key; '' = SERPER_API_KEY, …
      # Of url and web: a file that keeps the answers ('' = none), and requests
      # a second of each process (0 = any number).
      cache='', per_second=0.0,
      factory='',  # 'package.module:function' of a user's own engine
      # Of url, web and factory:
      timeout=15.0, retries=2,  # seconds a call, calls after one that fails
      give_up=60.0))  # seconds of searches without an answer that stop the run

  config.rollout = ConfigDict(dict(
      protocol='full',  # full | short: the texts around the turns
      chat='auto',  # chat template: auto (models tuned on theirs) | on | off
      max_turns=5, k=3, prompt_length=2048, response_length=800,
      observation_length=800, max_length=8192, temperature=1.0, top_k=0,
      top_p=1.0, length_multiple=128,
      slots=0,  # episodes in flight, 0 = a whole batch
      chunk=32,  # tokens decoded between two looks at the rows
      lag=1))  # chunks that a search may take before the device waits

  config.reward = ConfigDict(dict(
      variant='paper',  # paper | released
      wrong_format=config_dict.placeholder(float),  # paper 0, released -1
      search_key_coef=0.618, turn_scale=1.0,
      similarity='tfidf',  # tfidf | retriever
      answer=True, search_key=True, information_gain=True,
      redundancy_penalty=True, turn_reward=True,
      factory=''))  # 'package.module:function' of a user's own reward

  config.ppo = ConfigDict(dict(
      epochs=1, minibatch_size=64, microbatch_size=16,
      packing=True,  # short episodes share a row of the update
      gamma=1.0,
      gae_lambda=1.0, clip_eps=0.2, value_clip=0.5, kl_coef=1e-3,
      kl_kind='k1', entropy_coef=0.0, average='trajectory', whiten_floor=0.1,
      logprob_chunk=256, actor_lr=7e-7, critic_lr=7e-6, actor_warmup=0.285,
      critic_warmup=0.015, optimizer='adamw', weight_decay=0.0, beta1=0.9,
      beta2=0.999, max_grad_norm=1.0))

  config.warmup = ConfigDict(dict(
      steps=0,  # 0 = none
      batch_size=32, learning_rate=1e-5, ramp=0.05, weight_decay=0.0))
  # The world's sloppy searcher; unused with config.data.demonstrations.
  config.demonstrations = ConfigDict(dict(
      count=6000, hops=(2, 3, 4), shares=(0.7, 0.2, 0.1), good_query=0.3,
      retry=0.6, early_stop=0.15,
      rename=True))  # other names for the entities in every row

  config.eval = ConfigDict(dict(
      every=50, batch_size=128,
      sampled=True))  # also at T = rollout.temperature, first and last
  # The first and the last step to trace into <workdir>/profile; () = none.
  config.profile = ConfigDict(dict(steps=()))
  config.checkpoint = ConfigDict(dict(every=50, keep_latest=2, keep_best=1))
  return config
