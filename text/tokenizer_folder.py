"""
What the JSON files beside a tokenizer add to it, as transformers 4.57 reads them.

    tokenizer_config.json    {"eos_token": "<|im_end|>", "add_bos_token": true,
                              "added_tokens_decoder": {"32000": {"content": "<|im_end|>", ...}}}
    special_tokens_map.json  {"eos_token": "<|im_end|>"}  where the first lists no added tokens
    added_tokens.json        {"<|im_end|>": 32000}        the same
    config.json, generation_config.json                   {"eos_token_id": [2, 32000]}

    -> tokens to add: <|im_end|> (special), unless the tokenizer has them
    -> BOS, EOS:      <s>, <|im_end|>
    -> stop ids:      2, 32000, and EOS
"""
import json
from types import SimpleNamespace

# the keys that name a special token, in the order in which transformers adds them
SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
                "mask_token")
LLAMA_DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer",
                 "CodeLlamaTokenizerFast")


def read_settings(folder, has_model):
    """
    What the files of a folder say, a namespace:

    named      {"bos_token": name or None, ...}, where a file has the key
    defaults   {"bos_token": name, ...} of Llama's tokenizer, which count where no file has the key
    tokens     all tokens to add, as tokenizer.json lists them but without an id, in order
    renamed    {id: name} of added tokens that stand in Llama's first three places
    add_bos    True, False, or None: the tokenizer.json decides
    legacy, add_prefix_space   which text gets a blank in front; None where not said
    passes_json_over   a tokenizer.model counts even beside a tokenizer.json
    ids        {"bos": [ids], "eos": [ids]} of generation_config.json or else config.json

    has_model: there is a tokenizer.model, so that the tokenizer is Llama's unless a file differs.
    ValueError: a file is damaged, or holds other things than transformers writes.
    """
    config = read_object(folder / "tokenizer_config.json")
    model = read_object(folder / "config.json")
    is_llama = uses_llama_class(config, model, has_model)
    settings = SimpleNamespace(legacy=config.get("legacy"), ids=ids_of_configs(folder, model))
    try:
        settings.named, settings.tokens, settings.renamed = special_and_added(config, folder)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder}: the tokens of tokenizer_config.json, added_tokens.json or "
                         "special_tokens_map.json are not as transformers writes them: "
                         f"{error}") from None
    # what a missing key means differs: Llama's class has names for its tokens, puts BOS in front
    # and takes the blanks of its file
    if is_llama:
        settings.defaults = LLAMA_DEFAULTS
        settings.add_bos = config.get("add_bos_token", True)
        settings.add_prefix_space = config.get("add_prefix_space")
        settings.passes_json_over = settings.add_prefix_space is not None
        return settings
    # every other class goes by the file, but for the blank
    settings.defaults = {}
    settings.add_bos = None
    settings.add_prefix_space = config.get("add_prefix_space", False) if config else None
    settings.passes_json_over = False
    return settings


def special_and_added(config, folder):
    """`named`, `tokens` and `renamed` of read_settings."""
    # the special tokens by name
    named = {key: config[key] for key in SPECIAL_KEYS if key in config}
    more = list(config.get("additional_special_tokens") or [])
    # transformers 5 lists them under another name
    if isinstance(config.get("extra_special_tokens"), list):
        more += config["extra_special_tokens"]

    # tokenizer_config.json lists the added tokens, or else two older files do
    tokens = []
    renamed = {}
    if "added_tokens_decoder" in config:
        listed = config["added_tokens_decoder"]
        for i in sorted(listed, key=int):
            tokens.append(full_token(listed[i]))
            if int(i) < 3:
                renamed[int(i)] = tokens[-1]["content"]
    else:
        # which also name special tokens, and know no more of an added token than its id
        older = read_object(folder / "special_tokens_map.json")
        named |= {key: older[key] for key in SPECIAL_KEYS if key in older}
        more += older.get("additional_special_tokens") or []
        special = {name_of(token) for token in [*named.values(), *more]}
        ids = read_object(folder / "added_tokens.json")
        for name in sorted(ids, key=ids.get):
            tokens.append(full_token({"content": name, "special": name in special}))

    # special tokens that are only named are added as well
    by_name = {token["content"]: token for token in tokens}
    for value in [*named.values(), *more]:
        name = name_of(value)
        if name in by_name:
            by_name[name]["special"] = True
        elif name is not None:
            token = value if isinstance(value, dict) else {"content": name}
            by_name[name] = full_token({**token, "special": True})
            tokens.append(by_name[name])
    named = {key: name_of(value) for key, value in named.items()}
    return named, tokens, renamed


def uses_llama_class(config, model, has_model):
    """Whether transformers reads the folder by its Llama tokenizer."""
    name = config.get("tokenizer_class") or model.get("tokenizer_class")
    if name:
        return name in LLAMA_CLASSES
    return has_model or model.get("model_type") in ("llama", "mistral")


def name_of(token):
    """The text of a special token, which files give as a text, an object or null."""
    if token is None:
        return None
    name = token["content"] if isinstance(token, dict) else token
    if not isinstance(name, str):
        raise ValueError(f"expected a token's text, found {name!r}")
    return name


def full_token(token):
    """A token as tokenizer.json lists it; what is not said has the tokenizers package's default."""
    special = bool(token.get("special", False))
    full = {"content": name_of(token), "special": special}
    for key in ("single_word", "lstrip", "rstrip"):
        full[key] = bool(token.get(key, False))
    normalized = token.get("normalized")
    full["normalized"] = not special if normalized is None else bool(normalized)
    return full


def ids_of_configs(folder, model):
    """{"bos": [ids], "eos": [ids]}: of generation_config.json, or else of config.json."""
    generation = read_object(folder / "generation_config.json")
    found = {}
    # transformers' generate asks config.json only for what the other does not have
    for name in ("bos", "eos"):
        key = f"{name}_token_id"
        value = generation.get(key)
        file = "generation_config.json"
        if value is None:
            value = model.get(key)
            file = "config.json"
        if value is None:
            value = []
        ids = value if isinstance(value, list) else [value]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f"{folder / file}: {key}: expected an id or a list of ids, "
                             f"found {value!r}")
        found[name] = ids
    return found


def add_tokens(added, vocab, settings):
    """
    Append to `added`, tokens as tokenizer.json lists them, what settings add; return the new ones.

    vocab: {name: id} of the model. Ids follow the last one, as the tokenizers package gives them,
    whatever the files say. A token that is there already can only become special.
    """
    # Llama's own special tokens, unless the model lacks them
    tokens = list(settings.tokens)
    for name in settings.defaults.values():
        if name in vocab:
            tokens.append(full_token({"content": name, "special": True}))
    # a token of the model keeps its id, the others are numbered on
    by_name = {token["content"]: token for token in added}
    last = max([len(vocab) - 1, *[token["id"] for token in added]])
    new = []
    for token in tokens:
        name = token["content"]
        if name in by_name:
            by_name[name]["special"] = by_name[name]["special"] or token["special"]
            continue
        if name not in vocab:
            last += 1
        by_name[name] = {"id": vocab.get(name, last), **token}
        new.append(by_name[name])
    added += new
    return new


def id_named(settings, key, ids, own):
    """
    The id of "bos" or "eos", or None: of the token that a file names, else the tokenizer's own,
    else of config.json.
    """
    name = settings.named.get(f"{key}_token")
    if f"{key}_token" not in settings.named:
        name = settings.defaults.get(f"{key}_token")
    if name in ids:
        return ids[name]
    if own is not None:
        return own
    return settings.ids[key][0] if settings.ids[key] else None


def read_object(path):
    """A JSON file that holds an object; {} where there is none. ValueError if it is damaged."""
    if not path.is_file():
        return {}
    value = read_json(path, path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json(path, data):
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON (cut short?): {error}") from None
