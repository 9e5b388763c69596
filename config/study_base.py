"""
For quickstart.py: a base worth forgetting, a Llama with a width of 256 and 4.2M parameters, of which all that it read is known.

    python -m pip download --no-deps --no-binary=:all: --dest=data/raw/sdists django==5.2.8 sqlalchemy==2.0.40 pyramid==2.0.2 \\
        celery==5.5.3 docutils==0.22.2 sphinx==8.2.3 twisted==25.5.0
    mkdir -p data/raw/docs && for f in data/raw/sdists/*.tar.gz; do tar xzf $f -C data/raw/docs --wildcards '*/doc/*' '*/docs/*'; done
    python quickstart.py config/study_base.py        # 45 minutes of one core
    python -m paper.study config/regret_docs.py
    # the same on a base that was pretrained three times as long, two hours of one core
    python quickstart.py config/study_base.py --base_steps=2400 --out_dir=out/study_base_long
    python -m paper.study config/regret_docs.py --base=out/study_base_long/pretraining/step_2400 --out_dir=out/regret_docs_long

The source domain is the documentation of seven packages of Python, 18 MB of reStructuredText: Django, Celery (BSD-3-Clause),
Sphinx (BSD-2-Clause), SQLAlchemy, Twisted (MIT), Pyramid (BSD-derived) and Docutils (mostly public domain). Nothing of it
is handed on with this project.
"""
source = 'data/raw/docs'
data_dir = 'data/study_base'
out_dir = 'out/study_base'
source_problems = 0
vocab_size = 4096
hidden_size = 256
intermediate_size = 768
layers = 4
heads = 8
kv_heads = 4
base_steps = 800
base_batch = 16
base_learning_rate = 2e-3
steps = ()
