"""As swept.py, for the base of study_base.py: real text and twice the width. Its target is GSM8K, unless a file names another."""
base = base or 'out/study_base/pretraining/step_800'
_data = 'data/study_base'
_target = globals().get('_target', 'data/gsm8k_docs/train')
_held_out = globals().get('_held_out', 'data/gsm8k_docs/test')
include('swept.py')
