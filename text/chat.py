r"""
A conversation as the ids that a chat model reads: in its own template, or in one of CHATS.

    encode = chat_encoder(tokenizer, ["models/smollm2"])
    encode([("user", "Hi")])  ->  ids of <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n

    OwnTemplate(tokenizer, folders).turns([("user", "Hi"), ("assistant", "Hello")])
        ->  [("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Hello<|im_end|>")]

A model's own template is chat_template.jinja in its folder, or chat_template in its
tokenizer_config.json. It is rendered as transformers renders it, in Jinja's sandbox. Special tokens
that the template names become their ids; in what somebody said their names stay text, where
transformers makes ids of them, so that no message can end itself or speak for another role.
"""
import itertools
import json
import re
from datetime import datetime
from functools import partial
from pathlib import Path

import jinja2
import numpy as np
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from text.templates import CHATS
from text.tokenizer_json import HuggingFaceFile

# put into the names of special tokens in messages; it stands for no character
GUARD = "\ufdd0"


def chat_encoder(tokenizer, folders, template="", bos=False):
    """A function: messages [(role, content)], user's last -> ids of the prompt for an answer.

    template: a name in CHATS, with `bos` in front; '' = that of the first of `folders` with one.
    Raises ValueError where there is no such template, or it cannot be read."""
    if template in CHATS:
        return partial(encode_turns, tokenizer, template, bos)
    if template:
        raise ValueError(f"template: expected {', '.join(CHATS)} or none, found {template!r}")
    return OwnTemplate(tokenizer, folders).encode_prompt


# ----------------------------------------------------------------------------- ours
def encode_turns(tokenizer, template, bos, messages):
    """The ids of a conversation as prepare_data.py makes them for training."""
    # the answer to come ends the last turn, and is not there yet
    turns = CHATS[template]([*messages, ("assistant", "")])
    ids = []
    for number, (read, response) in enumerate(turns):
        begins = number == 0 or template == "llama2"
        ids += tokenizer.encode(read, bos=bos and begins)
        if number < len(turns) - 1:
            ids += tokenizer.encode(response, eos=True)
    return ids


# ----------------------------------------------------------------------------- the model's own
class OwnTemplate:
    """The first chat template of some folders, with the tokenizer whose special tokens it names.

    with_date: as transformers, let it write today's date; without, the same messages have the same
    ids tomorrow. Raises ValueError where there is no template, or it cannot be read."""

    def __init__(self, tokenizer, folders, with_date=True):
        for folder in folders:
            self.source = template_source(folder)
            if self.source:
                break
        else:
            raise ValueError(f"{folders[-1]} has no chat template; say "
                             f"--template={' or '.join(CHATS)}, whichever it was trained with")
        try:
            self.compiled = environment(with_date).from_string(self.source)
        except jinja2.TemplateError as e:
            raise ValueError(f"{folder}: its chat template cannot be read: {e}") from None
        self.tokenizer = tokenizer
        # names of special tokens, the longest first
        self.ids_of = special_names(tokenizer)
        names = sorted(self.ids_of, key=len, reverse=True)
        self.names = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def render(self, messages, add_generation_prompt):
        """The text of a conversation, in which names of special tokens that somebody said are
        guarded; ValueError where the template refuses it."""
        said = []
        for role, content in messages:
            said.append({"role": role, "content": self.names.sub(guarded, content)})
        name_of = {i: name for name, i in self.ids_of.items()}
        try:
            return self.compiled.render(messages=said, tools=None, documents=None,
                                        add_generation_prompt=add_generation_prompt,
                                        bos_token=name_of.get(self.tokenizer.bos_id, ""),
                                        eos_token=name_of.get(self.tokenizer.eos_id, ""))
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as e:
            raise ValueError(f"the chat template refuses these messages: {e}") from None

    def encode(self, text):
        """The ids of a text as rendered."""
        # special tokens, and the texts between them as they were before they were guarded
        texts = [part.replace(GUARD, "") for part in self.names.split(text)]
        special_ids = [self.ids_of[name] for name in self.names.findall(text)]
        return encode_between(self.tokenizer, texts, special_ids)

    def encode_prompt(self, messages):
        """The ids of the prompt for an answer to the last of these messages, a user's."""
        return self.encode(self.render(messages, add_generation_prompt=True))

    # ------------------------------------------------------------- to learn from
    def turns(self, messages, learn_all=False):
        """Messages that end with a response -> [(read, learned)], texts as rendered.

        One pair for the last response, or for each (learn_all); an empty one stays empty. It ends
        with its special token, and what follows that in the template is read by the next turn."""
        turns = []
        done = ""
        for place, (role, content) in enumerate(messages):
            is_last = place == len(messages) - 1
            if role != "assistant" or not (learn_all or is_last):
                continue
            before = self.render(messages[:place], add_generation_prompt=True)
            after = self.render(messages[:place + 1], add_generation_prompt=False)
            if not before.startswith(done) or not after.startswith(before):
                raise ValueError("the chat template writes earlier messages differently once there "
                                 "are more; --train_on_turns=last learns the last one alone")
            ends = [found.end() for found in self.names.finditer(after, len(before))]
            if not ends:
                raise ValueError("the chat template puts no special token behind a response, so "
                                 "that nothing would say where to stop")
            learned = after[len(before):ends[-1]]
            turns.append((before[len(done):], learned if content.strip() else ""))
            done = before + learned
        return turns

    def encode_learned(self, turns, dtype):
        """[(read, learned)] -> the same as bytes of ids, together those of the whole text.

        A token that reaches from one text into the next belongs to the second."""
        texts = [text for turn in turns for text in turn]
        ids = self.encode("".join(texts))
        borders = [0]
        for count in range(1, len(texts)):
            borders.append(common_start(self.encode("".join(texts[:count])), ids))
        pieces = []
        for begin, end in itertools.pairwise([*borders, len(ids)]):
            pieces.append(np.array(ids[begin:end], dtype).tobytes())
        return list(zip(pieces[::2], pieces[1::2]))


def common_start(first, second):
    """How many ids two lists begin with in common."""
    count = 0
    for a, b in zip(first, second):
        if a != b:
            break
        count += 1
    return count


def template_source(folder):
    """The text of a folder's chat template, or of the folder that a file is in; '' without one."""
    folder = Path(folder)
    if folder.is_file():
        folder = folder.parent
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        return alone.read_text(encoding="utf-8")
    found = None
    config = folder / "tokenizer_config.json"
    if config.is_file():
        found = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    # several of them have names
    if isinstance(found, list):
        found = {each["name"]: each["template"] for each in found}.get("default")
    return found or ""


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}, in which templates put what the model says."""
    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment(with_date):
    """Jinja as transformers sets it up for chat templates, which always has the date."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                         extensions=[loopcontrols, Generation])
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = refuse
    if with_date:
        made.globals["strftime_now"] = now
    return made


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def refuse(message):
    raise jinja2.TemplateError(message)


def now(form):
    return datetime.now().strftime(form)


def encode_between(tokenizer, texts, special_ids):
    """The ids of texts with a special token between each two, as transformers encodes all in one
    string; but no text becomes a special token. ValueError: half a surrogate pair in a text."""
    "".join(texts).encode()
    if isinstance(tokenizer.tool, HuggingFaceFile) and tokenizer.tool.hides(special_ids):
        return tokenizer.tool.encode_between(texts, special_ids)

    # sentencepiece puts a blank in front of each text, as transformers does for Llama-2
    ids = []
    takes_blanks = False
    for text, i in zip(texts, [*special_ids, None]):
        if takes_blanks:
            text = text.lstrip()
        before, takes_blanks = tokenizer.strips.get(i, (False, False))
        if before:
            text = text.rstrip()
        if text:
            ids += tokenizer.encode(text)
        ids.append(i)
    return ids[:-1]


def special_names(tokenizer):
    """{name: id} of the special tokens, and of BOS and EOS, which a sentencepiece file has too."""
    names = dict(tokenizer.special_ids)
    for name, i in tokenizer.ids.items():
        if i in (tokenizer.bos_id, tokenizer.eos_id):
            names[name] = i
    return names


def guarded(found):
    """The name of a special token, broken after its first character."""
    return found[0][0] + GUARD + found[0][1:]
