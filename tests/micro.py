"""configs/tiny.py cut down until it learns nothing, in seconds."""

OVERRIDES = (
    'num_steps=4', 'batch_size=8', 'tensorboard=false', 'mesh=(1, 1, -1)',
    'model.embed=32', 'model.layers=2', 'model.heads=2', 'model.kv_heads=1',
    'model.head_dim=16', 'model.mlp=32', 'world.train_entities=24',
    'world.eval_entities=16', 'world.name_words=8', 'data.train_questions=40',
    'data.eval_questions=10', 'retriever.dimensions=128',
    'ppo.minibatch_size=4', 'ppo.microbatch_size=2', 'warmup.steps=6',
    'warmup.batch_size=8', 'demonstrations.count=40', 'eval.every=2',
    'eval.batch_size=8', 'checkpoint.every=2')
# Metrics of the machine, or of the process.
UNREPEATABLE = ('time/', 'rollout/tokens_per_s')
