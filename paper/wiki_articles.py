"""Wikipedia articles as records, where there is no hub: from the dump that gensim is tested with.

    python -m venv .venv-gensim && .venv-gensim/bin/pip install gensim==4.4.0
    .venv-gensim/bin/python paper/wiki_articles.py data/raw/wiki_100.jsonl

    {"text": "Anarchism is a political philosophy that advocates ..."}      100 such lines

The text of Wikipedia is CC BY-SA 3.0. For config/peft_smollm2.py, which measures forgetting by the
loss on these articles.
"""
import argparse
import bz2
import json
import re
from pathlib import Path

ARTICLES = 100


def read_articles(dump, extract_pages, filter_wiki):
    """Yield the texts of a dump's articles, without markup; redirects and empty ones are left out.

    dump: a MediaWiki export as .xml.bz2; the functions: gensim's."""
    with bz2.open(dump) as pages:
        for _, marked_up, _ in extract_pages(pages, filter_namespaces=("0",)):
            text = filter_wiki(marked_up)
            text = re.sub("''+", "", text).strip()  # bold and italic
            if text and not text.upper().startswith("#REDIRECT"):
                yield text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the JSON lines file to write")
    out = parser.parse_args().out
    try:
        from gensim import test
        from gensim.corpora.wikicorpus import extract_pages, filter_wiki
    except ModuleNotFoundError as error:
        parser.error(f"{error}; pip install gensim==4.4.0")

    dump, = Path(test.__file__).parent.glob("test_data/enwiki-*-shortened.bz2")
    lines = []
    for text in read_articles(dump, extract_pages, filter_wiki):
        lines.append(json.dumps({"text": text}) + "\n")
    if len(lines) < ARTICLES:
        parser.error(f"{dump} has {len(lines)} articles, expected {ARTICLES}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(lines[:ARTICLES]))
    print(f"{ARTICLES} of {len(lines)} articles of {dump.name} -> {out}")
