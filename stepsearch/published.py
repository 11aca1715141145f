"""Published numbers that evaluations are compared with, as data.

EM and F1 of arXiv 2505.15107 (EMNLP 2025 main 1106), its main table; what it
was measured with, from the paper and its released code.
"""

from __future__ import annotations

SOURCE = 'arXiv 2505.15107'

# Columns: a set of questions and the passages that were searched.
COLUMNS = ('hotpotqa', '2wiki', 'musique', 'bamboogle', 'musique*')
TITLES = {
    'hotpotqa': 'HotpotQA', '2wiki': '2Wiki', 'musique': 'MuSiQue',
    'bamboogle': 'Bamboogle', 'musique*': 'MuSiQue*'}
SIZES = {'hotpotqa': 7405, '2wiki': 12576, 'musique': 2417, 'bamboogle': 125}
SPLITS = {
    'hotpotqa': 'dev', '2wiki': 'dev', 'musique': 'dev', 'bamboogle': 'test'}

WIKI18 = 'wiki-18, 21 million passages of 100 words'
OWN_CORPUS = "MuSiQue's own paragraphs"  # of musique*
PROTOCOL = {
    'encoder': 'E5-base-v2',
    'k': 3,
    'max_turns': 5,
    'response_length': 800,  # both in tokens, of the released code
    'observation_length': 800,
    'decoding': 'sampled at T = 1, the last partial batch dropped (the released'
                ' code)',
    'model': 'Qwen2.5 of the size given',
}

# System, EM and F1 by column, as many columns as are published.
NUMBERS = (
    ('3B Search-R1 base', (
        (.272, .361), (.248, .296), (.081, .146), (.176, .270), (.118, .193))),
    ('3B Search-R1 instruct', (
        (.304, .401), (.293, .352), (.120, .188), (.240, .344), (.162, .240))),
    ('3B PPO, answer F1', (
        (.223, .315), (.225, .273), (.090, .163), (.176, .266))),
    ('3B GRPO, answer F1', (
        (.256, .366), (.256, .325), (.114, .190), (.224, .314))),
    ('3B StepSearch base', (
        (.329, .434), (.339, .395), (.181, .273), (.328, .419), (.274, .375))),
    ('3B StepSearch instruct', (
        (.345, .452), (.320, .385), (.174, .261), (.344, .452), (.258, .357))),
    ('7B Search-R1 base', (
        (.432, .547), (.350, .411), (.206, .290), (.430, .545), (.305, .401))),
    ('7B PPO, answer F1', (
        (.374, .479), (.282, .329), (.198, .280), (.432, .549))),
    ('7B GRPO, answer F1', (
        (.351, .462), (.266, .345), (.202, .291), (.400, .512))),
    ('7B StepSearch base', (
        (.380, .493), (.385, .450), (.216, .324), (.467, .573), (.346, .461))),
    ('7B StepSearch instruct', (
        (.386, .502), (.366, .431), (.226, .312), (.400, .534), (.339, .443))),
)
